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

BLOCK = 64  # rows of a block: a compromise of padding and the size of a product


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
    block = min(BLOCK, rows)
    blocks = -(-rows // block) + min(n, rows)
    group = selected.transpose(0, 2, 1, 3).reshape(b, h, rows)
    place, source, owner = _per_head(partial(_dispatch, n=n, block=block, blocks=blocks))(group)

    queries = jnp.concatenate([q, jnp.zeros_like(q[:, :1])], axis=1).transpose(0, 2, 1, 3)
    token = jnp.minimum(source // top_k, t)
    buffer = jnp.take_along_axis(queries, token[..., None], axis=2)
    buffer = buffer.reshape(b, h, blocks, block, -1)

    @partial(jax.checkpoint, prevent_cse=False)
    def read(buffer: Array, weights: Weights) -> Array:
        # [b, h, blocks, ...] to the memory's own order of axes, [..., h, c, k]
        own = jax.tree.map(lambda w: take(_per_block, w, owner), weights)
        own = jax.tree.map(lambda w: w.swapaxes(1, 2), own)
        return memory.read(apply_weights(own, q.dtype), buffer.swapaxes(1, 2)).swapaxes(1, 2)

    result = read(buffer, weights)
    result = result.reshape(b, h, blocks * block, -1)
    result = jnp.concatenate([result, jnp.zeros_like(result[:, :, :1])], axis=2)
    y = jnp.take_along_axis(result, place[..., None], axis=2)
    return y.reshape(b, h, t, top_k, -1).transpose(0, 2, 1, 3, 4)


def _per_head(function):  # type: ignore[no-untyped-def]
    return jax.vmap(jax.vmap(function))


def _per_block(weights: Array, owner: Array) -> Array:
    """Take the memory [b, h, blocks, o, i] of each block from [b, n, h, o, i]."""
    return _per_head(partial(jnp.take, axis=0, mode="clip"))(weights.swapaxes(1, 2), owner)


def _dispatch(group: Array, n: int, block: int, blocks: int) -> tuple[Array, Array, Array]:
    """Place rows in blocks that hold one memory each.

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
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    count = jnp.zeros(n + 1, jnp.int32).at[group].add(1)
    first = jnp.cumsum(count) - count
    needed = -(-count[:n] // block)
    last_block = jnp.cumsum(needed)
    start = jnp.concatenate([(last_block - needed) * block, jnp.full(1, blocks * block, jnp.int32)])
    sorted_group = group[order]
    rank = jnp.arange(rows, dtype=jnp.int32) - first[sorted_group]
    sorted_place = jnp.where(sorted_group < n, start[sorted_group] + rank, blocks * block)
    place = jnp.zeros(rows, jnp.int32).at[order].set(sorted_place)
    source = jnp.full(blocks * block, rows, jnp.int32).at[sorted_place].set(order, mode="drop")
    owner = jnp.searchsorted(last_block, jnp.arange(blocks, dtype=jnp.int32), side="right").clip(
        max=n - 1
    )
    return place, source, owner
