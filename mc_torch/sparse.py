"""Reads of selected memories: rows sorted by memory, padded to whole blocks (section 6).

The work grows with the number of rows, t · top_k, not with the number of memories.
"""

from functools import partial

import torch

from mc_torch.backends import Memory, Weights
from mc_torch.backends.base import apply_weights
from mc_torch.host import take
from mc_torch.numerics import Array, remat, tree_map

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
    group = selected.permute(0, 2, 1, 3).reshape(b, h, rows)
    dispatched = _dispatch(group, n, block, blocks)
    place, source, owner = (x.transpose(1, 2) for x in dispatched)  # heads behind the rows
    token = source.reshape(b, blocks, block, h).transpose(2, 3) // top_k
    buffer = _take(q, token, "fill")  # [b, blocks, h, block, k]

    @remat
    def read(buffer: Array, weights: Weights) -> Array:
        own = tree_map(lambda w: take(partial(_take, mode="clip"), w, owner), weights)
        return memory.read(apply_weights(own, q.dtype), buffer)

    place = place.reshape(b, t, top_k, h).transpose(2, 3)
    return _take_row(read(buffer, weights), place)


def _take(x: Array, index: Array, mode: str) -> Array:
    """Take [b, g, h, ..., *rest] from [b, n, h, *rest] at [b, g, h, ...]; heads stay in place."""
    b, n, h, *rest = x.shape
    batch = torch.arange(b, device=x.device).reshape(b, *[1] * (index.ndim - 1))
    head = torch.arange(h, device=x.device).reshape(1, 1, h, *[1] * (index.ndim - 3))
    flat = (batch * n + index.clamp(max=n - 1)) * h + head
    taken = torch.index_select(x.reshape(b * n * h, *rest), 0, flat.reshape(-1))
    taken = taken.reshape(*index.shape, *rest)
    if mode == "clip":
        return taken
    return taken.masked_fill((index >= n).reshape(*index.shape, *[1] * len(rest)), 0)


def _take_row(x: Array, place: Array) -> Array:
    """Take [b, t, h, m, v] from [b, g, h, c, v] at [b, t, h, m] of its g · c; 0 past the end."""
    b, g, h, c, v = x.shape
    batch = torch.arange(b, device=x.device).reshape(b, 1, 1, 1)
    head = torch.arange(h, device=x.device).reshape(1, 1, h, 1)
    row = place.clamp(max=g * c - 1)
    flat = ((batch * g + row // c) * h + head) * c + row % c
    taken = torch.index_select(x.reshape(b * g * h * c, v), 0, flat.reshape(-1))
    return taken.reshape(*place.shape, v).masked_fill((place >= g * c)[..., None], 0)


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
    # Block i belongs to the memory with as many before it as have their last block up to i.
    past = group.new_zeros(b, h, blocks + 1)
    past = past.scatter_add(-1, last_block.clamp(max=blocks), torch.ones_like(last_block))
    owner = torch.cumsum(past, dim=-1)[..., :blocks].clamp(max=n - 1)
    return place, source, owner
