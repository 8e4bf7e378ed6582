"""Sums over the slots of a stream's cached memories, of which only the first ones are filled."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from mc_jax.backends import Weights
from mc_jax.host import take
from mc_jax.numerics import Array, align

READS = 8  # of one token each that a step takes together: few tokens read many slots at once

# (tokens [b, s, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
Read = Callable[[Array, Weights], Array]


def sum_over_slots(read: Read, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`; slots from `filled` on cost nothing.

    Args:
        read: how tokens read some memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 at slots from `filled` on.
        weights: memories, each [b, n, h, o, i].
        filled: int32 [].

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    n, size = gates.shape[-1], _block(gates.shape[-1], gates.shape[2])
    x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))

    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, gates: Array, weights: Weights) -> Array:
        return jnp.sum(gates.transpose(0, 3, 1, 2)[..., None] * read(x, weights), axis=1)

    if size == n:
        return weighted(x, gates, tuple(take(jnp.asarray, w) for w in weights))

    def part_of(x: Array, first: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)

    def step(total: Array, block: Array) -> tuple[Array, None]:
        # The last block begins early enough to be whole: the slots it shares weigh nothing.
        first = jnp.minimum(block * size, n - size)
        new = align(first + jnp.arange(size, dtype=first.dtype) >= block * size, gates.ndim)

        def add(total: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(gates, first, size, axis=-1)
            some = tuple(take(part_of, w, first) for w in weights)
            return total + weighted(x, jnp.where(new, part, jnp.zeros_like(part)), some)

        return jax.lax.cond(first < filled, add, lambda total: total, total), None

    first = jax.eval_shape(
        lambda: weighted(x, gates[..., :size], tuple(take(part_of, w, filled) for w in weights))
    )
    zero = jnp.zeros_like(gates, shape=first.shape)
    blocks = jnp.arange(-(-n // size), dtype=jnp.int32)
    return jax.lax.scan(step, zero, blocks)[0]


def _block(n: int, tokens: int) -> int:
    # At least two steps: slots that a loop reads are not copied, those of a plain product are.
    return max(1, min(READS // tokens, n // 2))
