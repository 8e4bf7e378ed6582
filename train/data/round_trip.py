"""Losses of a tokenizer: encode and decode a text, and compare."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

SAMPLE = 16_384  # characters on which a loss is measured


class RoundTrip(NamedTuple):
    """Result of encoding and decoding a text; plain values.

    Attributes:
        exact: decoding gives the text, nothing added.
        lost: share of the characters that decoding does not return in order.
        sample: characters from the text's start on which `lost` was measured.
    """

    exact: bool
    lost: float
    sample: int

    @property
    def warning(self) -> str | None:
        """A warning about a loss, or None."""
        if not self.lost:
            return None
        return (
            f"warning: {100 * self.lost:.2g}% of the characters are lost in decoding "
            f"(of the first {self.sample:,} of the text): the tokenizer drops or changes text, so "
            "its bits per byte cannot be compared with those of bytes or of another tokenizer"
        )


def check_round_trip(
    tokenizer: Tokenizer, texts: Sequence[str], encode: Callable[[str], Sequence[int]]
) -> RoundTrip:
    """Encode and decode texts.

    The whole text is checked; how much is lost is measured on its first `SAMPLE` characters, and
    is at least one character of the whole if only later text changes. Unknown tokens
    decode to nothing.

    Args:
        tokenizer: decodes.
        texts: documents, each encoded by itself.
        encode: from text to tokens.
    """
    whole = "".join(texts)
    tokens = [encode(text) for text in texts]
    decoded = "".join(tokenizer.decode(ids, skip_special_tokens=False) for ids in tokens)
    if decoded == whole:
        return RoundTrip(True, 0.0, len(whole))
    unknown = _unknown(tokenizer)

    def decode(ids: Sequence[int]) -> str:
        known = [i for i in ids if i != unknown]
        return tokenizer.decode(known, skip_special_tokens=False)

    if _is_subsequence(whole, "".join(map(decode, tokens))):
        return RoundTrip(False, 0.0, len(whole))
    size = min(SAMPLE, len(whole))
    first, left = "", size
    for text in texts:
        first += decode(encode(text[:left]))
        left -= len(text[:left])
        if not left:
            break
    lost = 1 - common_subsequence(whole[:size], first) / size
    return RoundTrip(False, max(lost, 1 / len(whole)), size)


def common_subsequence(one: str, other: str) -> int:
    """Return the length of the longest common subsequence, in O(len(one) len(other) / 64)."""
    # Bit i of `ends` is 0 where the subsequence with one[: i + 1] is longer than with one[:i]
    # (Hyyrö, 2004).
    places: dict[str, int] = {}
    for place, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << place
    full = (1 << len(one)) - 1
    ends = full
    for character in other:
        hits = ends & places.get(character, 0)
        ends = ((ends + hits) | (ends - hits)) & full
    return len(one) - ends.bit_count()


def _is_subsequence(one: str, other: str) -> bool:
    rest = iter(other)
    return all(character in rest for character in one)


def _unknown(tokenizer: Tokenizer) -> int | None:
    """Return the id of the tokenizer's unknown token."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    name = model.get("unk_token")
    return None if name is None else tokenizer.token_to_id(name)
