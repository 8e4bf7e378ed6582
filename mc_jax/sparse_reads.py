"""Reads of selected memories: rows sorted by memory, padded to whole blocks (section 6).

The cost is proportional to the number of rows, t · top_k, and independent of the number of
memories.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mc_jax.backends import Memory, Weights
from mc_jax.backends.base import apply_weights
from mc_jax.numerics import Array
from mc_jax.offload import read_from_host

ROW_BLOCK = 64  # rows per block: larger blocks add padding, smaller ones are less efficient


def read_selected(
    memory: Memory,
    weights: Weights,
    q: Array,
    selected: Array,
    *,
    row_block: int = ROW_BLOCK,
) -> Array:
    """Read each query from its selected memories.

    Args:
        memory: the memory kind.
        weights: cached memories, each [b, n, h, o, i].
        q: queries [b, t, h, k].
        selected: indices of memories [b, t, h, top_k]; n = unused.
        row_block: number of rows per block.

    Returns:
        [b, t, h, top_k, v], zero at unused entries.
    """
    b, t, h, top_k = selected.shape
    n = weights[0].shape[1]
    rows = t * top_k
    block = min(row_block, rows)
    blocks = -(-rows // block) + min(n, rows)
    group = selected.transpose(0, 2, 1, 3).reshape(b, h, rows)
    dispatch = jax.vmap(jax.vmap(partial(_dispatch, n=n, block=block, blocks=blocks)))
    position, source, block_memory = (
        x.swapaxes(1, 2) for x in dispatch(group)
    )  # move heads after rows
    token = source.reshape(b, blocks, block, h).swapaxes(2, 3) // top_k
    buffer = _gather_memories(q, token, "fill")  # [b, blocks, h, block, k]

    @partial(jax.checkpoint, prevent_cse=False)
    def read(buffer: Array, weights: Weights) -> Array:
        gathered = jax.tree.map(
            lambda w: read_from_host(partial(_gather_memories, mode="clip"), w, block_memory),
            weights,
        )
        return memory.read(apply_weights(gathered, q.dtype), buffer)

    position = position.reshape(b, t, top_k, h).swapaxes(2, 3)
    return _gather_rows(read(buffer, weights), position)


def _gather_memories(x: Array, index: Array, mode: str) -> Array:
    """Gather [b, g, h, ..., *rest] from [b, n, h, *rest] at indices [b, g, h, ...] of axis n."""
    rest = x.shape[3:]
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(index.ndim, index.ndim + len(rest))),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 2),
    )
    return jax.lax.gather(x, index[..., None], where, (1, 1, 1, *rest), mode=mode, fill_value=0)


def _gather_rows(x: Array, position: Array) -> Array:
    """Gather [b, t, h, m, v] at rows [b, t, h, m] of [b, g, h, c, v]; 0 past the last row."""
    c, v = x.shape[3:]
    where = jax.lax.GatherDimensionNumbers(
        offset_dims=(4,),
        collapsed_slice_dims=(1, 3),
        start_index_map=(1, 3),
        operand_batching_dims=(0, 2),
        start_indices_batching_dims=(0, 2),
    )
    index = jnp.stack([position // c, position % c], axis=-1)
    return jax.lax.gather(x, index, where, (1, 1, 1, 1, v), mode="fill", fill_value=0)


def _dispatch(group: Array, n: int, block: int, blocks: int) -> tuple[Array, Array, Array]:
    """Assign rows to blocks, so that all rows of a block read the same memory.

    Example: 13 tokens in segments of 4, n = 4 memories; every token after the first segment selects
    one memory. The 13 rows are assigned to 9 blocks of 3 rows, with 27 positions in total:

        row        0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12
        group      4  4  4  4 |  0  0  0  0 |  0  1  1  0 |  2
        position  27 27 27 27 |  0  1  2  3 |  4  6  7  5 |  9

        block          0        | 1        | 2        | 3        | 4 to 8
        source         4  5  6  | 7  8 11  | 9 10 13  | 12 13 13 | 13
        block_memory   0        | 0        | 1        | 2        | 3

    Args:
        group: [rows] memory index of each row; n = the row reads no memory.
        n: number of memories.
        block: number of rows per block.
        blocks: maximum number of blocks, including one partly filled block per memory.

    Returns:
        position: [rows] position of each row in the blocks; out of range if it reads no memory.
        source: [blocks * block] row at each position; `rows` at padding.
        block_memory: [blocks] memory of each block.
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
    sorted_position = jnp.where(sorted_group < n, start[sorted_group] + rank, blocks * block)
    position = jnp.zeros(rows, jnp.int32).at[order].set(sorted_position)
    source = jnp.full(blocks * block, rows, jnp.int32).at[sorted_position].set(order, mode="drop")
    # JAX 0.10 cannot trace searchsorted inside of `jax.shard_map`.
    passed = jnp.cumsum(jnp.zeros(blocks + 1, jnp.int32).at[last_block].add(1))
    return position, source, passed[:blocks].clip(max=n - 1)


def _sort(group: Array, n: int) -> tuple[Array, Array]:
    """Sort memory indices [rows] in 0..n. Return the sorted indices and the permutation."""
    row = jnp.arange(group.shape[0], dtype=jnp.int32)
    bits = int(group.shape[0] - 1).bit_length()
    if (n + 1) << bits > jnp.iinfo(jnp.int32).max:
        order = jnp.argsort(group, stable=True).astype(jnp.int32)
        return group[order], order
    # perf(cpu): sort one combined key instead of pairs.
    key = jnp.sort(group << bits | row, stable=False)
    return key >> bits, key & ((1 << bits) - 1)
