"""Training tokens of a run: arrays in memory or shards on disk, in one or several parts."""

from typing import NamedTuple, Protocol

import numpy as np

from train.data.separator import Separator


class Tokens(Protocol):
    """A sequence of tokens [t], such as an array: it has a length, and slices are arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


class Part(NamedTuple):
    """A part of the training tokens that has its own share of the examples.

    Attributes:
        start: index of its first token.
        stop: index after its last token.
        weight: share of the examples, relative to those of the other parts.
    """

    start: int
    stop: int
    weight: float


class TextSource(NamedTuple):
    """Training tokens and held-out text.

    Attributes:
        tokens: training tokens.
        parts: parts with their own weights; empty for a single part.
        held_out: held-out documents, at least as many as are scored.
        documents: numbers of training and held-out documents.
        separator: separator between documents.
        digest: hash of the training tokens, and of the weights.
    """

    tokens: Tokens
    parts: tuple[Part, ...]
    held_out: list[bytes]
    documents: tuple[int, int]
    separator: Separator
    digest: str
