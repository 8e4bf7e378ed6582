"""Validation bits per byte, beside references on the same bytes."""

import lzma
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.devices import split_rows
from train.config import TextConfig, TrainConfig
from train.data import Corpus, clip
from train.step import Tree, token_losses

Validate = Callable[[Tree, Tree, int], float]


class References(NamedTuple):
    """Bits per byte of methods that need no model; each sees the scored bytes only."""

    uniform: float
    order0: float  # entropy of the byte frequencies, the table of frequencies not counted
    xz: float  # the size of `xz -9`, container and all


def references(text: bytes) -> References:
    """Measure the references on `text`."""
    shares = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    shares = shares[shares > 0]
    order0 = float(-(shares * np.log2(shares)).sum())
    return References(8.0, order0, 8 * len(lzma.compress(text, preset=9)) / len(text))


def make_validation(graphdef: nnx.GraphDef, config: TrainConfig, corpus: Corpus) -> Validate:
    """Return the function from parameters, rest and a number of bytes to bits per byte.

    It scores so many bytes from the start of the validation text: the bits that the model needs for
    them, divided by their number. Every token is predicted once, from the tokens before it in its
    window, which starts from nothing; a window's first token is predicted from the last one of
    the window before. Before the text's first token there is nothing: it costs log2(vocab_size).
    """
    assert isinstance(config.data, TextConfig)
    window, rows = config.data.window, config.run.batch_size

    @jax.jit
    def nats(params: Tree, rest: Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        losses, _ = token_losses(graphdef, params, rest, tokens)
        return jnp.where(mask, losses, 0.0).sum()

    def validate(params: Tree, rest: Tree, limit: int) -> float:
        text = clip(corpus.validation, limit)
        tokens = corpus.encode(text).astype(np.int32)
        last = len(tokens) - 1
        total = 0.0
        for start in range(0, last, rows * window):
            index = start + np.arange(rows)[:, None] * window + np.arange(window + 1)
            mask = index[:, 1:] <= last
            batch = split_rows((tokens[np.minimum(index, last)], mask), params)
            total += float(nats(params, rest, *batch))
        return (total / math.log(2) + math.log2(config.model.vocab_size)) / len(text)

    return validate
