"""Reads of the cached memories of all devices by the tokens of one (see `mc_jax.context`).

A device reads the memories of its own blocks in tiles (`dense_reads`), and those of other blocks
block by block: with paired blocks, 2P - 1 blocks on each of P devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mc_core.segmentation import bucket_ends
from mc_jax.backends import Weights
from mc_jax.context import TokenSplit, take_blocks
from mc_jax.dense_reads import TileRead, sum_earlier_reads
from mc_jax.numerics import Array


def sum_split_reads(
    read: TileRead, x: Array, gates: Array, weights: Weights, *, blocks: Array, split: TokenSplit
) -> Array:
    """Compute `sum_earlier_reads` for the blocks of a device and the memories of all devices.

    Args:
        read: function that reads one memory, weighted by the gates.
        x: tokens of each segment of s blocks [b * s, h, n, c, i].
        gates: [b * s, h, n, c, blocks * n].
        weights: memories of all segments, each [b, blocks * n, h, o, i].
        blocks: indices of the blocks [s].
        split: the split of the tokens.

    Returns:
        [b * s, h, n, c, o] in the gates' dtype.
    """
    r, h, n, c, _ = x.shape
    s = blocks.size
    b = r // s
    total = _sum_other_blocks(
        read,
        x.reshape(b, s, h, n * c, -1),
        gates.reshape(b, s, h, n * c, split.blocks, n),
        tuple(w.reshape(b, split.blocks, n, *w.shape[2:]) for w in weights),
        blocks=blocks,
        split=split,
    )
    total = total.reshape(r, h, n, c, -1)
    if n == 1:
        return total
    by_block = gates.reshape(b, s, *gates.shape[1:])
    parts = [take_blocks(by_block[:, i], blocks[i : i + 1], split, axis=-1) for i in range(s)]
    own = tuple(take_blocks(w, blocks, split).reshape(r, n, *w.shape[2:]) for w in weights)
    return total + sum_earlier_reads(read, x, jnp.stack(parts, axis=1).reshape(r, h, n, c, n), own)


def _sum_other_blocks(
    read: TileRead,
    x: Array,
    gates: Array,
    weights: Weights,
    *,
    blocks: Array,
    split: TokenSplit,
) -> Array:
    """Sum the reads of all memories in earlier blocks than the token's own: [b, s, h, c, o].

    Takes x [b, s, h, c, i], gates [b, s, h, c, blocks, n] and weights [b, blocks, n, h, o, i].
    """
    device = blocks[0]
    step = jnp.arange(split.blocks - 1, dtype=blocks.dtype)
    # The first block of device i has i earlier ones, and the second one all others.
    inside = step < device
    slot = jnp.where(inside, 0, split.per_device - 1)
    other = jnp.where(inside | (not split.paired), step, step - device)

    x = jnp.moveaxis(x, 1, 0)  # [s, b, h, c, i]
    gates = gates.transpose(1, 4, 0, 5, 2, 3)[slot, other]  # [steps, b, n, h, c]
    if not split.paired:  # later blocks
        gates = jnp.where(inside[:, None, None, None, None], gates, jnp.zeros_like(gates))
    gates = gates.swapaxes(1, 2).reshape(-1, *gates.shape[1:2], *gates.shape[3:])
    memories = tuple(jnp.take(w, other, axis=1) for w in weights)  # [b, steps, n, h, o, i]
    memories = tuple(
        w.transpose(1, 2, 0, 3, 4, 5).reshape(-1, w.shape[0], *w.shape[3:]) for w in memories
    )
    slots = jnp.repeat(slot, weights[0].shape[2])

    # The backward pass recomputes the reads; tokens are selected inside, so that only the indices
    # are saved.
    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, slot: Array, gate: Array, memory: Weights) -> Array:
        tokens = jax.lax.dynamic_index_in_dim(x, slot, keepdims=True)
        return read(tokens, gate[None], tuple(w[None] for w in memory))

    def add(total: Array, inputs: tuple[Array, Array, Weights]) -> tuple[Array, None]:
        slot, gate, memory = inputs
        old = jax.lax.dynamic_index_in_dim(total, slot, keepdims=True)
        new = old + weighted(x, slot, gate, memory)
        return jax.lax.dynamic_update_slice_in_dim(total, new, slot, axis=0), None

    inputs = slots, gates, memories
    shape = jax.eval_shape(weighted, x, *jax.tree.map(lambda leaf: leaf[0], inputs)).shape
    total = jnp.zeros_like(gates, shape=(x.shape[0], *shape[1:]))
    return jnp.moveaxis(jax.lax.scan(add, total, inputs)[0], 0, 1)


def sum_split_bucket_reads(
    read: TileRead, x: Array, gates: Array, weights: Weights, *, blocks: Array, split: TokenSplit
) -> Array:
    """Compute `sum_bucket_reads` for the blocks of a device and the buckets of all devices.

    Args:
        read: function that reads one memory, weighted by the gates.
        x: tokens of each segment of s blocks [b * s, h, n, c, i].
        gates: [b * s, h, n, c, slots]; the last axis is the exponent e.
        weights: bucket that ends with each segment, each [b, blocks * n, h, o, i].
        blocks: indices of the blocks [s].
        split: the split of the tokens.

    Returns:
        [b * s, h, n, c, o] in the gates' dtype.
    """
    r, _, n, _, _ = x.shape
    every = n * split.blocks
    ends = bucket_ends(every, range(every))
    index = take_blocks(jnp.asarray(ends, blocks.dtype), blocks, split, axis=0)  # [s * n, slots]

    @jax.checkpoint
    def weighted(x: Array, gate: Array, index: Array, weights: Weights) -> Array:
        def by_segment(w: Array) -> Array:
            w = jnp.take(w, jnp.minimum(index, every - 1), axis=1)
            return jnp.moveaxis(w.reshape(r, n, *w.shape[2:]), 1, 0)

        return read(x, gate, tuple(map(by_segment, weights)))

    x = x.transpose(2, 0, 1, 3, 4)
    parts = [
        weighted(x, gates[..., e].transpose(2, 0, 1, 3), index[:, e], weights)
        for e in range(ends.shape[1])
        if (ends[:, e] < every).any()
    ]
    return sum(parts[1:], parts[0]).transpose(1, 2, 0, 3, 4)
