"""Reads of selected memories: rows sorted by memory, padded to whole blocks (section 6).

The work grows with the number of rows, t · top_k, not with the number of memories.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mc_jax.backends import Memory, Weights
from mc_jax.backends.base import apply_weights
from mc_jax.host import take
from mc_jax.numerics import Array

ROW_BLOCK = 64  # rows of a block: a compromise of padding and the size of a product


def read_selected(memory: Memory, weights: Weights, q: Array, selected: Array) -> Array:
    """Read every query from the memories that it selected.

    Args:
        memory: the memory kind.
        weights: cached memories, each [b, n, h, o, i].
        q: queries [b, t, h, k].
        selected: [b, t, h, top_k] indices of memories; n where a slot is empty.

    Returns:
        [b, t, h, top_k, v]; zeros in empty slots.
    """
    b, t, h, top_k = selected.shape
    n = weights[0].shape[1]
    rows = t * top_k
    block = min(ROW_BLOCK, rows)
    blocks = -(-rows // block) + min(n, rows)
    group = selected.transpose(0, 2, 1, 3).reshape(b, h, rows)
    dispatch = jax.vmap(jax.vmap(partial(_dispatch, n=n, block=block, blocks=blocks)))
    place, source, owner = (x.swapaxes(1, 2) for x in dispatch(group))  # heads behind the rows
    token = source.reshape(b, blocks, block, h).swapaxes(2, 3) // top_k
    buffer = _take(q, token, "fill")  # [b, blocks, h, block, k]

    @partial(jax.checkpoint, prevent_cse=False)
    def read(buffer: Array, weights: Weights) -> Array:
        own = jax.tree.map(lambda w: take(partial(_take, mode="clip"), w, owner), weights)
        return memory.read(apply_weights(own, q.dtype), buffer)

    place = place.reshape(b, t, top_k, h).swapaxes(2, 3)
    return _take_row(read(buffer, weights), place)


def _take(x: Array, index: Array, mode: str) -> Array:
    """Take [b, g, h, ..., *rest] from [b, n, h, *rest] at [b, g, h, ...]; heads stay in place."""
    rest = x.shape[3:]
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + len(rest))),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 2),
    )
    return jax.lax.gather(x, index[..., None], where, (1, 1, 1, *rest), mode=mode, fill_value=0)


def _take_row(x: Array, place: Array) -> Array:
    """Take [b, t, h, m, v] from [b, g, h, c, v] at [b, t, h, m] of its g · c; 0 past the end."""
    c, v = x.shape[3:]
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(4,),
        collapsed_slice_dims=(1, 3),
        start_index_map=(1, 3),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 2),
    )
    index = jnp.stack([place // c, place % c], axis=-1)
    return jax.lax.gather(x, index, where, (1, 1, 1, 1, v), mode="fill", fill_value=0)


def _dispatch(group: Array, n: int, block: int, blocks: int) -> tuple[Array, Array, Array]:
    """Place rows in blocks that hold one memory each.

    13 tokens in segments of 4, of which those after the first 4 select one memory each, give 13
    rows for n = 4 memories; in blocks of 3, of which there are 9, they stand at 27 places:

        row      0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12
        group    4  4  4  4 |  0  0  0  0 |  0  1  1  0 |  2
        place   27 27 27 27 |  0  1  2  3 |  4  6  7  5 |  9

        block    0        | 1        | 2        | 3        | 4 to 8
        source   4  5  6  | 7  8 11  | 9 10 13  | 12 13 13 | 13
        owner    0        | 0        | 1        | 2        | 3

    Args:
        group: [rows] the memory of each row; n for none.
        n: number of memories.
        block: rows of a block.
        blocks: number of blocks, enough for every memory's last block to be partly empty.

    Returns:
        place: [rows] where each row stands among the blocks; one past the end for none.
        source: [blocks * block] the row at each place; `rows` where there is none.
        owner: [blocks] the memory of each block.
    """
    rows = group.shape[0]
    group = group.astype(jnp.int32)
    sorted_group, order = _sort(group, n)
    count = jnp.zeros(n + 1, jnp.int32).at[group].add(1)
    first = jnp.cumsum(count) - count
    needed = -(-count[:n] // block)
    last_block = jnp.cumsum(needed)
    start = jnp.concatenate([(last_block - needed) * block, jnp.full(1, blocks * block, jnp.int32)])
    rank = jnp.arange(rows, dtype=jnp.int32) - first[sorted_group]
    sorted_place = jnp.where(sorted_group < n, start[sorted_group] + rank, blocks * block)
    place = jnp.zeros(rows, jnp.int32).at[order].set(sorted_place)
    source = jnp.full(blocks * block, rows, jnp.int32).at[sorted_place].set(order, mode="drop")
    owner = jnp.searchsorted(last_block, jnp.arange(blocks, dtype=jnp.int32), side="right").clip(
        max=n - 1
    )
    return place, source, owner


def _sort(group: Array, n: int) -> tuple[Array, Array]:
    """Return the rows' memories [rows], at most n, in order, and the rows that had them."""
    row = jnp.arange(group.shape[0], dtype=jnp.int32)
    bits = int(group.shape[0] - 1).bit_length()
    if (n + 1) << bits > jnp.iinfo(jnp.int32).max:
        order = jnp.argsort(group, stable=True).astype(jnp.int32)
        return group[order], order
    # One key of both: XLA's CPU takes four times as long to sort pairs.
    both = jnp.sort(group << bits | row, stable=False)
    return both >> bits, both & ((1 << bits) - 1)
