"""Log-likelihoods by a single full pass, for tests of `mc harness`."""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax import LanguageModel

WIDTH = 96  # tokens of the padded pass


@cache
def _compiled(graphdef: nnx.GraphDef) -> jax.stages.Wrapped:
    return jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))


def full_pass(model: LanguageModel, ids: Sequence[int]) -> np.ndarray:
    """Return the log-probabilities after each token, float64 [t, vocab_size]."""
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : len(ids)] = ids
    graphdef, state = nnx.split(model)
    logits = np.asarray(_compiled(graphdef)(state, jnp.asarray(tokens)), np.float64)[0, : len(ids)]
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def likelihood(
    model: LanguageModel, context: Sequence[int], new: Sequence[int]
) -> tuple[float, bool]:
    """Return the log-probability of `new`, and whether each of its tokens is the most likely."""
    rows = full_pass(model, [*context, *new])[len(context) - 1 : -1]
    total = sum(row[token] for row, token in zip(rows, new, strict=True))
    return float(total), all(row.argmax() == token for row, token in zip(rows, new, strict=True))


def continue_greedily(model: LanguageModel, ids: Sequence[int], count: int) -> list[int]:
    """Return `count` tokens by repeated full passes."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(full_pass(model, ids)[-1].argmax()))
    return ids[-count:]
