"""A text encoded for a run's model, with the text of each token."""

import codecs
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mc_core.errors import UserError
from train.config import TrainConfig
from train.data.tokenizer import load_tokenizer, tokenize


@dataclass(frozen=True)
class Text:
    """A text and its tokens.

    Attributes:
        source: the text: bytes for byte-level models, otherwise a string.
        tokens: int32 [t].
        spans: [t, 2] begin and end of each token in `source`.
        pieces: the text of each token; their concatenation is the text up to the last token. A
            character of several tokens belongs to its last byte, or with a tokenizer to its first
            token; the pieces of the other tokens are empty.
        total: number of tokens of the whole text.
    """

    source: bytes | str
    tokens: np.ndarray
    spans: np.ndarray
    pieces: tuple[str, ...]
    total: int

    def first(self, count: int) -> "Text":
        """Return the text with only its first `count` tokens; `source` is unchanged."""
        kept = slice(count)
        return replace(
            self, tokens=self.tokens[kept], spans=self.spans[kept], pieces=self.pieces[kept]
        )

    def find(self, words: str) -> np.ndarray:
        """Return the tokens that cover the first occurrence of `words`, if any."""
        source, wanted = self.source, words.encode() if isinstance(self.source, bytes) else words
        start = source.find(wanted)  # type: ignore[arg-type]
        begins, ends = self.spans.T
        if not words or start < 0 or ends[-1] < start + len(wanted):
            return np.zeros(0, np.int64)
        return np.flatnonzero((ends > start) & (begins < start + len(wanted)))


def read_text(path: Path, config: TrainConfig) -> Text:
    """Read a file and encode it like the text of the run.

    Raises:
        UserError: the file is empty, or the tokenizer cannot encode it.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if not data:
        raise UserError(f"{path}: the file is empty: use a file with text")
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    if tokenizer is None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(data[i : i + 1]) for i in range(len(data))]
        pieces[-1] += decoder.decode(b"", final=True)
        place = np.arange(len(data))
        tokens = np.frombuffer(data, np.uint8).astype(np.int32)
        spans = np.stack([place, place + 1], axis=1)
        return Text(data, tokens, spans, tuple(pieces), len(data))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}: a tokenizer needs UTF-8 text") from error
    encoded = tokenize(tokenizer, text)
    if not encoded.ids:
        raise UserError(f"{path}: {config.tokenizer} returns no token for it: use another file")
    ends = np.maximum.accumulate([end for _, end in encoded.offsets])
    # Text that the tokenizer skips, such as blanks, is added to the next piece.
    begins = [0, *ends[:-1]]
    pieces = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    tokens = np.asarray(encoded.ids, np.int32)
    return Text(text, tokens, np.asarray(encoded.offsets), tuple(pieces), len(tokens))
