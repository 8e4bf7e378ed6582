"""Separators between the documents of a corpus."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tokenizers import Tokenizer

# End-of-text tokens; if a tokenizer has several, the first one is used. End-of-turn tokens
# (<|im_end|>, <|eot_id|>) and BERT's [SEP] are not included: set `data.separator` to use them.
END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
)
NEWLINE = "\n"
_BRACKETED = re.compile(r"<.+>|\[.+\]")


class Joined(NamedTuple):
    """Concatenated documents.

    Attributes:
        text: the documents, joined by the separator if it has bytes.
        borders: positions in `text` of separator tokens; empty if the separator is text.
    """

    text: bytes
    borders: tuple[int, ...] = ()


@dataclass(frozen=True)
class Separator:
    """Separator between two documents.

    Attributes:
        text: separator bytes, which count as bytes of the text.
        token: id of a separator token, used instead of bytes; it counts as zero bytes.
        name: name of the token.
        if_missing: omit the separator if the document before already ends with it.
    """

    text: bytes = b""
    token: int | None = None
    name: str = ""
    if_missing: bool = False

    @property
    def description(self) -> str:
        """Description of the separator."""
        if self.token is not None:
            where = (
                ", unless the document before it ends with this token" if self.if_missing else ""
            )
            return f"the token {self.name!r} (id {self.token}, zero bytes){where}"
        if not self.text:
            return "nothing"
        where = ", unless the document before it ends with one" if self.if_missing else ""
        words = self.text.decode(errors="replace")
        return f"{'a newline' if words == NEWLINE else repr(words)}{where}"

    def join(self, documents: Sequence[bytes]) -> Joined:
        """Return the documents joined by the separator."""
        parts: list[bytes] = []
        borders: list[int] = []
        size = 0
        for number, document in enumerate(documents):
            if number and not (self.if_missing and self.ends(documents[number - 1])):
                if self.token is not None:
                    borders.append(size)
                parts.append(self.text)
                size += len(self.text)
            parts.append(document)
            size += len(document)
        return Joined(b"".join(parts), tuple(borders))

    def ends(self, document: bytes) -> bool:
        """Return True if a document ends with the separator."""
        if self.token is None:
            return document.endswith(self.text)
        return document.rstrip().endswith(self.name.encode())


NO_SEPARATOR = Separator()


def choose_separator(given: str | None, tokenizer: Tokenizer | None) -> Separator:
    """Return the separator of a run.

    Args:
        given: `data.separator`. None: the tokenizer's end-of-text token, if its name is in
            `END_OF_TEXT`; otherwise a newline after documents that do not end with one. The name of
            an added token, or of any token in angle or square brackets, selects that token. Any
            other string is text.
        tokenizer: tokenizer of the run; None for bytes.
    """
    newline = Separator(NEWLINE.encode(), if_missing=True)
    if tokenizer is None:
        return newline if given is None else Separator(given.encode())
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    every = tokenizer.get_vocab()
    if given is not None:
        token = added.get(given)
        if token is None and _BRACKETED.fullmatch(given):
            token = every.get(given)
        return Separator(given.encode()) if token is None else Separator(token=token, name=given)
    for vocabulary in (added, every):
        for name in END_OF_TEXT:
            if name in vocabulary:
                return Separator(token=vocabulary[name], name=name, if_missing=True)
    return newline


def prefix_token(separator: Separator, tokenizer: Tokenizer | None) -> int | None:
    """Return the id of the token that precedes a text without a context.

    It is the token between documents in training: the separator's last token, or a newline. None:
    the tokenizer has no token for it.
    """
    if separator.token is not None:
        return separator.token
    text = separator.text or NEWLINE.encode()
    if tokenizer is None:
        return text[-1]
    ids = tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids
    return ids[-1] if ids else None
