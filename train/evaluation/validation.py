"""Validation bits per byte, total and by position in the window, with references."""

import lzma
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mc_core.errors import UserError
from mc_jax.sharding import split_rows, use_mesh_of
from train.config import TextConfig, TrainConfig
from train.data.corpus import Corpus
from train.data.documents import clip
from train.distributed import to_host
from train.step import Tree, token_losses

FIRST_EDGE = 16  # end of the first bucket of positions; buckets double in length


class Validation(NamedTuple):
    """Bits of a text under a model."""

    bits_per_byte: float  # over all bytes
    bits: np.ndarray  # float64 [window]: bits of the token at a position, summed over windows
    tokens: np.ndarray  # int64 [window]: number of those tokens

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens, including the first one, which has no position."""
        return int(self.tokens.sum()) + 1

    @property
    def positions(self) -> list[dict[str, Any]]:
        """The mean bits per token by position; see `by_position`."""
        return by_position(self.bits, self.tokens)


Validate = Callable[[Tree, Tree, int], Validation]
Scorer = Callable[[Tree, Tree, np.ndarray, int], Validation]
TokenScorer = Callable[[Tree, Tree, np.ndarray], np.ndarray]


def position_edges(window: int) -> list[int]:
    """Return the edges of buckets of positions, 0, 16, 32, 64, ..., window."""
    edges = [0, FIRST_EDGE]
    while edges[-1] < window:
        edges.append(2 * edges[-1])
    return [*edges[:-1], window]


def by_position(bits: np.ndarray, tokens: np.ndarray) -> list[dict[str, Any]]:
    """Return the mean bits per token in buckets of positions: [0, 16), [16, 32), [32, 64), ...

    The last bucket ends with the window. Empty buckets are omitted.

    Args:
        bits: [window], total bits at each position.
        tokens: [window], number of tokens at each position.

    Returns:
        One dictionary per bucket of positions [start, end): `start`, `end`, the number of `tokens`
        and their mean `bits`.
    """
    buckets = []
    for start, end in pairwise(position_edges(len(bits))):
        if count := int(tokens[start:end].sum()):
            mean = float(bits[start:end].sum()) / count
            buckets.append({"start": start, "end": end, "tokens": count, "bits": mean})
    return buckets


class References(NamedTuple):
    """Bits per byte of baselines that use only the scored bytes."""

    uniform: float
    order0: float  # entropy of the byte frequencies, without the cost of the frequency table
    xz: float  # size of the output of `xz -9`, including the container


def references(text: bytes) -> References:
    """Measure the references on `text`."""
    shares = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    shares = shares[shares > 0]
    order0 = float(-(shares * np.log2(shares)).sum())
    return References(8.0, order0, 8 * len(lzma.compress(text, preset=9)) / len(text))


def make_validation(graphdef: nnx.GraphDef, config: TrainConfig, corpus: Corpus) -> Validate:
    """Return a function that scores the start of the validation text; see `make_scorer`.

    It maps parameters, other state and a number of bytes to a `Validation`.
    """
    assert isinstance(config.data, TextConfig)
    score = make_scorer(graphdef, config)

    def validate(params: Tree, rest: Tree, limit: int) -> Validation:
        size = len(clip(corpus.validation, limit))
        return score(params, rest, corpus.validation_tokens(limit), size)

    return validate


def make_scorer(graphdef: nnx.GraphDef, config: TrainConfig) -> Scorer:
    """Return a function that scores a text.

    It maps parameters, other state, tokens and a number of bytes to a `Validation`. The score is
    the number of bits of all tokens, including separators between documents, divided by the number
    of bytes. Windows are as long as the longest training example; see `make_token_scorer`. The
    first token of the text has no context: it costs log2(vocab_size), and has no position.
    """
    window = config.data.max_tokens
    score_tokens = make_token_scorer(graphdef, config, window)

    def score(params: Tree, rest: Tree, tokens: np.ndarray, size: int) -> Validation:
        each = score_tokens(params, rest, tokens)
        place = np.arange(len(each)) % window
        bits = np.bincount(place, each, window)
        counts = np.bincount(place, minlength=window)
        whole = float(bits.sum()) + math.log2(config.model.vocab_size)
        return Validation(whole / size, bits, counts)

    return score


def make_token_scorer(graphdef: nnx.GraphDef, config: TrainConfig, window: int) -> TokenScorer:
    """Return a function from parameters, other state and tokens [t] to bits [t - 1].

    Every token but the first one is predicted once. Windows start with an empty state and read the
    last token of the previous window first, so the token at position i (from 0) of a window is
    predicted from i + 1 tokens.

    Args:
        graphdef: graph definition of the model.
        config: configuration of the run; its batches set the number of tokens per call.
        window: predicted tokens per window.
    """
    rows = max(1, config.run.batch_size * config.data.max_tokens // window)

    @jax.jit
    def nats(params: Tree, rest: Tree, tokens: jax.Array) -> jax.Array:
        return token_losses(graphdef, params, rest, tokens)[0]

    def score(params: Tree, rest: Tree, tokens: np.ndarray) -> np.ndarray:
        if not len(tokens):
            raise UserError("the text to score: the tokenizer returns no token")
        tokens = tokens.astype(np.int32)
        last = len(tokens) - 1
        parts = [np.zeros(0)]
        for start in range(0, last, rows * window):
            index = start + np.arange(rows)[:, None] * window + np.arange(window + 1)
            mask = index[:, 1:] <= last
            batch = split_rows(tokens[np.minimum(index, last)], params)
            with use_mesh_of(params):
                found = nats(params, rest, batch)
            parts.append(to_host(found).astype(np.float64)[mask])
        return np.concatenate(parts) / math.log(2)

    return score
