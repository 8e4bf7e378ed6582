"""Reads of selected memories: rows sorted by memory, padded to whole blocks (section 6).

The cost is proportional to the number of rows, t · top_k, and independent of the number of
memories.
"""

from functools import partial

import torch

from mc_torch.backends import Memory, Weights
from mc_torch.backends.base import apply_weights
from mc_torch.numerics import Array, remat, tree_map
from mc_torch.offload import read_from_host

ROW_BLOCK = 64  # rows per block: larger blocks add padding, smaller ones are less efficient


def read_selected(memory: Memory, weights: Weights, q: Array, selected: Array) -> Array:
    """Read each query from its selected memories.

    Args:
        memory: the memory kind.
        weights: cached memories, each [b, n, h, o, i].
        q: queries [b, t, h, k].
        selected: indices of memories [b, t, h, top_k]; n = unused.

    Returns:
        [b, t, h, top_k, v], zero at unused entries.
    """
    b, t, h, top_k = selected.shape
    n = weights[0].shape[1]
    rows = t * top_k
    block = min(ROW_BLOCK, rows)
    blocks = -(-rows // block) + min(n, rows)
    group = selected.permute(0, 2, 1, 3).reshape(b, h, rows)
    dispatched = _dispatch(group, n, block, blocks)
    position, source, block_memory = (
        x.transpose(1, 2) for x in dispatched
    )  # move heads after rows
    token = source.reshape(b, blocks, block, h).transpose(2, 3) // top_k
    buffer = _gather_memories(q, token, "fill")  # [b, blocks, h, block, k]

    @remat
    def read(buffer: Array, weights: Weights) -> Array:
        gathered = tree_map(
            lambda w: read_from_host(partial(_gather_memories, mode="clip"), w, block_memory),
            weights,
        )
        return memory.read(apply_weights(gathered, q.dtype), buffer)

    position = position.reshape(b, t, top_k, h).transpose(2, 3)
    return _gather_rows(read(buffer, weights), position)


def _gather_memories(x: Array, index: Array, mode: str) -> Array:
    """Gather [b, g, h, ..., *rest] from [b, n, h, *rest] at indices [b, g, h, ...] of axis n."""
    b, n, h, *rest = x.shape
    batch = torch.arange(b, device=x.device).reshape(b, *[1] * (index.ndim - 1))
    head = torch.arange(h, device=x.device).reshape(1, 1, h, *[1] * (index.ndim - 3))
    flat = (batch * n + index.clamp(max=n - 1)) * h + head
    gathered = torch.index_select(x.reshape(b * n * h, *rest), 0, flat.reshape(-1))
    gathered = gathered.reshape(*index.shape, *rest)
    if mode == "clip":
        return gathered
    return gathered.masked_fill((index >= n).reshape(*index.shape, *[1] * len(rest)), 0)


def _gather_rows(x: Array, position: Array) -> Array:
    """Gather [b, t, h, m, v] at rows [b, t, h, m] of [b, g, h, c, v]; 0 past the last row."""
    b, g, h, c, v = x.shape
    batch = torch.arange(b, device=x.device).reshape(b, 1, 1, 1)
    head = torch.arange(h, device=x.device).reshape(1, 1, h, 1)
    row = position.clamp(max=g * c - 1)
    flat = ((batch * g + row // c) * h + head) * c + row % c
    gathered = torch.index_select(x.reshape(b * g * h * c, v), 0, flat.reshape(-1))
    return gathered.reshape(*position.shape, v).masked_fill((position >= g * c)[..., None], 0)


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
        group: [b, h, rows] memory of each row; n = none.
        n: number of memories.
        block: number of rows per block.
        blocks: maximum number of blocks, including one partly filled block per memory.

    Returns:
        position: [b, h, rows] position of each row among the blocks; past the end if none.
        source: [b, h, blocks * block] row at each position; `rows` at padding.
        block_memory: [b, h, blocks] memory of each block.
    """
    b, h, rows = group.shape
    positions = blocks * block
    sorted_group, order = torch.sort(group, dim=-1, stable=True)
    count = group.new_zeros(b, h, n + 1).scatter_add(-1, group, torch.ones_like(group))
    first = torch.cumsum(count, dim=-1) - count
    needed = (count[..., :n] + block - 1) // block
    last_block = torch.cumsum(needed, dim=-1)
    start = (last_block - needed) * block
    start = torch.cat([start, torch.full_like(start[..., :1], positions)], dim=-1)
    rank = torch.arange(rows, device=group.device) - torch.gather(first, -1, sorted_group)
    sorted_position = torch.where(
        sorted_group < n, torch.gather(start, -1, sorted_group) + rank, positions
    )
    position = torch.zeros_like(group).scatter(-1, order, sorted_position)
    source = group.new_full((b, h, positions + 1), rows)
    source = source.scatter(-1, sorted_position, order)[..., :positions]
    # The memory of block i is the number of memories whose blocks all precede it.
    past = group.new_zeros(b, h, blocks + 1)
    past = past.scatter_add(-1, last_block.clamp(max=blocks), torch.ones_like(last_block))
    block_memory = torch.cumsum(past, dim=-1)[..., :blocks].clamp(max=n - 1)
    return position, source, block_memory
