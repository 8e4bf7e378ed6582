"""Sums over the slots of a stream's cached memories, of which only the first ones are filled."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from mc_jax.backends import Weights
from mc_jax.host import take
from mc_jax.numerics import Array, align

READS = 8  # of one token each that a step takes together: few tokens read many slots at once
RUN = 256  # tokens that go through the slots together, to the last one that any of them reads

# (tokens [b, s, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
SlotRead = Callable[[Array, Weights], Array]


def sum_over_slots(
    read: SlotRead, x: Array, gates: Array, weights: Weights, segment: Array
) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`; slots that no token of a run reads cost nothing.

    Args:
        read: how tokens read some memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 at slots that a token does not read.
        weights: memories, each [b, n, h, o, i].
        segment: int32 [b, c], one past the last slot that a token reads.

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    b, h, c, _ = x.shape
    if c <= RUN:
        return _sum_run(read, x, gates, weights, jnp.max(segment))

    def split(x: Array, axis: int) -> Array:
        widths = [(0, -c % RUN if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths).reshape(*x.shape[:axis], -1, RUN, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def run(part: tuple[Array, Array, Array]) -> Array:
        x, gates, segment = part
        return _sum_run(read, x, gates, weights, jnp.max(segment))

    sums = jax.lax.map(run, (split(x, 2), split(gates, 2), split(segment, 1)))
    return jnp.moveaxis(sums, 0, 2).reshape(b, h, -1, sums.shape[-1])[:, :, :c]


def _sum_run(read: SlotRead, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
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
