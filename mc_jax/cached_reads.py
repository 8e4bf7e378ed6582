"""Weighted sums of reads of a stream's cached memories, which fill only the first slots."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from mc_jax.backends import Weights
from mc_jax.numerics import Array, expand_leading_dims
from mc_jax.offload import read_from_host

MAX_READS = 8  # maximum number of (token, slot) pairs per step
BLOCK = 256  # tokens per block; a block reads the slots that at least one of its tokens reads

# (tokens [b, s, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
CachedRead = Callable[[Array, Weights], Array]


def sum_cached_reads(
    read: CachedRead, x: Array, gates: Array, weights: Weights, segment: Array
) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`, skipping slots that no token of a block reads.

    Args:
        read: function that reads several memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 where a token does not read a slot.
        weights: memories, each [b, n, h, o, i].
        segment: int32 [b, c], number of slots that a token may read.

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    b, h, c, _ = x.shape
    if c <= BLOCK:
        return _sum_block(read, x, gates, weights, jnp.max(segment))

    def split(x: Array, axis: int) -> Array:
        widths = [(0, -c % BLOCK if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths).reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def sum_block(part: tuple[Array, Array, Array]) -> Array:
        x, gates, segment = part
        return _sum_block(read, x, gates, weights, jnp.max(segment))

    sums = jax.lax.map(sum_block, (split(x, 2), split(gates, 2), split(segment, 1)))
    return jnp.moveaxis(sums, 0, 2).reshape(b, h, -1, sums.shape[-1])[:, :, :c]


def sum_indexed_reads(
    read: CachedRead, x: Array, gates: Array, weights: Weights, index: Array
) -> Array:
    """Return `Σ_e gates_e read(x, weights[index_e])` for chunks of tokens that read the same slots.

    Args:
        read: function that reads one memory per chunk: tokens [g, b, 1, h, c, i] and weights
            [g, b, 1, h, o, i].
        x: tokens [g, b, 1, h, c, i].
        gates: [g, b, 1, h, c, n], 0 where nothing is read.
        weights: memories, each [b, m, h, o, i].
        index: memories of each chunk, int32 [g, b, n]; m = none.

    Returns:
        [g, b, 1, h, c, o] in the gates' dtype.
    """
    row = jnp.arange(index.shape[1], dtype=index.dtype)[None]

    def gather(w: Array, which: Array, row: Array) -> Array:
        return w[row, jnp.minimum(which, w.shape[1] - 1)]

    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, gate: Array, weights: Weights) -> Array:
        return gate[..., None] * read(x, tuple(w[:, :, None] for w in weights))

    def add(total: Array, which: Array, gate: Array) -> Array:
        memories = tuple(read_from_host(gather, w, which, row) for w in weights)
        return total + weighted(x, gate, memories)

    def step(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        which, gate = inputs
        is_read = jnp.any(which < weights[0].shape[1])
        return jax.lax.cond(is_read, add, lambda total, *_: total, total, which, gate), None

    by_exponent = jnp.moveaxis(index, -1, 0), jnp.moveaxis(gates, -1, 0)
    zero = jnp.zeros_like(gates[..., 0])
    shape = jax.eval_shape(add, zero[..., None], index[..., 0], gates[..., 0]).shape
    return jax.lax.scan(step, jnp.zeros_like(gates, shape=shape), by_exponent)[0]


def _sum_block(read: CachedRead, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
    """Compute `sum_cached_reads` for one block of tokens, over the first `filled` slots.

    Each step reads a group of slots. Example: 17 tokens in segments of 4 have n = 5 slots. A single
    token reads groups of 2: slots 0 1, 2 3 and 3 4. The last group overlaps the previous one to
    have full size, and the gate of the repeated slot 3 is set to 0. Token 12 in segment 3 reads
    slots 0 1 2: `filled` is 3, and group 3 4 is skipped.
    """
    n, size = gates.shape[-1], _block_size(gates.shape[-1], gates.shape[2])
    x = jnp.broadcast_to(x[:, None], (x.shape[0], size, *x.shape[1:]))

    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, gates: Array, weights: Weights) -> Array:
        return jnp.sum(gates.transpose(0, 3, 1, 2)[..., None] * read(x, weights), axis=1)

    if size == n:
        return weighted(x, gates, tuple(read_from_host(jnp.asarray, w) for w in weights))

    def slice_weights(first: Array) -> Weights:
        def block(w: Array, first: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(w, first, size, axis=1)

        return tuple(read_from_host(block, w, first) for w in weights)

    def step(total: Array, number: Array) -> tuple[Array, None]:
        first = jnp.minimum(number * size, n - size)
        is_new = expand_leading_dims(
            first + jnp.arange(size, dtype=first.dtype) >= number * size, gates.ndim
        )

        def add(total: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(gates, first, size, axis=-1)
            part = jnp.where(is_new, part, jnp.zeros_like(part))
            return total + weighted(x, part, slice_weights(first))

        return jax.lax.cond(first < filled, add, lambda total: total, total), None

    shape = jax.eval_shape(lambda: weighted(x, gates[..., :size], slice_weights(filled))).shape
    numbers = jnp.arange(-(-n // size), dtype=jnp.int32)
    return jax.lax.scan(step, jnp.zeros_like(gates, shape=shape), numbers)[0]


def _block_size(n: int, tokens: int) -> int:
    # Use at least two steps, because a loop, unlike a single product, does not copy the slots.
    return max(1, min(MAX_READS // tokens, n // 2))
