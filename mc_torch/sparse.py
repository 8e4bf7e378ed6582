"""Reads of selected memories: rows sorted by memory, padded to whole blocks (section 6).

The work grows with the number of rows, t · top_k, not with the number of memories.
"""

import torch

from mc_torch.backends import Memory, Weights
from mc_torch.backends.base import apply_weights
from mc_torch.host import take
from mc_torch.numerics import Array, remat, tree_map

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
    group = selected.permute(0, 2, 1, 3).reshape(b, h, rows)
    place, source, owner = _dispatch(group, n, block, blocks)

    queries = torch.cat([q, torch.zeros_like(q[:, :1])], dim=1).transpose(1, 2)
    token = (source // top_k).clamp(max=t)
    buffer = _take(queries, token).reshape(b, h, blocks, block, -1)

    @remat
    def read(buffer: Array, weights: Weights) -> Array:
        # [b, h, blocks, ...] to the memory's own order of axes, [..., h, c, k]
        own = tree_map(lambda w: take(_take, w.transpose(1, 2), owner).transpose(1, 2), weights)
        return memory.read(apply_weights(own, q.dtype), buffer.transpose(1, 2)).transpose(1, 2)

    result = read(buffer, weights).reshape(b, h, blocks * block, -1)
    result = torch.cat([result, torch.zeros_like(result[:, :, :1])], dim=2)
    y = _take(result, place)
    return y.reshape(b, h, t, top_k, -1).permute(0, 2, 1, 3, 4)


def _take(x: Array, index: Array) -> Array:
    """Take [b, h, m, ...] from [b, h, n, ...] at index [b, h, m]."""
    b, h, n, *rest = x.shape
    head = torch.arange(b * h, device=x.device).reshape(b, h, 1) * n
    taken = torch.index_select(x.reshape(b * h * n, *rest), 0, (head + index).reshape(-1))
    return taken.reshape(*index.shape, *rest)


def _dispatch(group: Array, n: int, block: int, blocks: int) -> tuple[Array, Array, Array]:
    """Place rows in blocks that hold one memory each.

    Args:
        group: [b, h, rows] the memory of each row; n for none.
        n: number of memories.
        block: rows of a block.
        blocks: number of blocks, enough for every memory's last block to be partly empty.

    Returns:
        place: [b, h, rows] where each row stands among the blocks; one past the end for none.
        source: [b, h, blocks * block] the row at each place; `rows` where there is none.
        owner: [b, h, blocks] the memory of each block.
    """
    b, h, rows = group.shape
    places = blocks * block
    sorted_group, order = torch.sort(group, dim=-1, stable=True)
    count = group.new_zeros(b, h, n + 1).scatter_add(-1, group, torch.ones_like(group))
    first = torch.cumsum(count, dim=-1) - count
    needed = (count[..., :n] + block - 1) // block
    last_block = torch.cumsum(needed, dim=-1)
    start = (last_block - needed) * block
    start = torch.cat([start, torch.full_like(start[..., :1], places)], dim=-1)
    rank = torch.arange(rows, device=group.device) - torch.gather(first, -1, sorted_group)
    sorted_place = torch.where(
        sorted_group < n, torch.gather(start, -1, sorted_group) + rank, places
    )
    place = torch.zeros_like(group).scatter(-1, order, sorted_place)
    source = group.new_full((b, h, places + 1), rows)
    source = source.scatter(-1, sorted_place, order)[..., :places]
    number = torch.arange(blocks, device=group.device).expand(b, h, blocks).contiguous()
    owner = torch.searchsorted(last_block, number, right=True).clamp(max=n - 1)
    return place, source, owner
