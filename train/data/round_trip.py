"""Encoding losses of a tokenizer, measured by encoding and decoding a text."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

SAMPLE = 16_384  # number of characters on which the loss is measured


class RoundTrip(NamedTuple):
    """Result of encoding and decoding a text, as plain values.

    Attributes:
        exact: True if decoding returns exactly the text.
        lost: share of the characters that are not in a common subsequence with the decoded text.
        sample: number of characters, from the start of the text, on which `lost` was measured.
    """

    exact: bool
    lost: float
    sample: int

    @property
    def warning(self) -> str | None:
        """Warning about lost characters, or None."""
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

    `exact` is checked on the whole text. The loss is measured on the first `SAMPLE` characters; if
    only later text changes, it is one character of the whole text. Unknown tokens are decoded to
    the empty string.

    Args:
        tokenizer: tokenizer that decodes.
        texts: documents, which are encoded separately.
        encode: function from text to tokens.
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
