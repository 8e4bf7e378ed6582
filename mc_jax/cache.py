"""The streaming state of a layer's memories: an immutable tree, valid between any two tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_jax.backends import Memory, MemoryState, Weights
from mc_jax.numerics import Array, state_dtype


class Segments(NamedTuple):
    """The memory of every segment after its last token so far (section 4)."""

    weights: Weights  # first layer first, each [b, n, h, o, i]
    pool: Array  # pooled keys m [b, n, h, k]
    length: Array  # real tokens of the segment, int32 [b, n]


class Cache(NamedTuple):
    """All that the next token needs to know of the ones before it."""

    segments: Segments
    state: MemoryState  # the online memory
    pool_sum: Array  # sum of the online segment's keys [b, h, k]
    length: Array  # real tokens of the online segment, int32 [b]
    position: Array  # tokens so far, masked ones included, int32 [b]


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: W_0, first layer first, each [h, o, i].
        k: keys [..., h, c, k]; the state's leading axes, device placement and dtype come from them.
        v: values [..., h, c, v].
    """
    dtype = state_dtype(k.dtype)
    # Derived from the inputs, so that a scan's carry keeps their sharding.
    zero = jnp.zeros_like(k[..., :1, :1], dtype=dtype)
    weights = tuple(
        w.astype(dtype).reshape((1,) * (zero.ndim - 3) + w.shape) + zero
        for w in memory.prepare(initial)
    )
    momentum = jax.tree.map(jnp.zeros_like, weights) if memory.config.kind == "titans" else ()
    previous: Weights = ()
    if memory.reaches_back:
        previous = tuple(jnp.zeros_like(x[..., 0, :], dtype=dtype) for x in (k, v))
    return MemoryState(weights, momentum, weights if memory.is_mlp else (), previous)


def choose(condition: Array, yes: MemoryState, no: MemoryState) -> MemoryState:
    """Select whole states; `condition` [b] or [b, r] matches their leading axes."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(pick, yes, no)
