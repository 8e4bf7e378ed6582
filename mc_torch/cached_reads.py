"""Weighted sums of reads of a stream's cached memories, which fill only the first slots."""

from collections.abc import Callable

import torch

from mc_torch.backends import Weights
from mc_torch.cache import is_traced
from mc_torch.numerics import Array, remat
from mc_torch.offload import read_from_host

MAX_READS = 64  # maximum number of (token, slot) pairs per step
BLOCK = 256  # tokens per block; a block reads the slots that at least one of its tokens reads

# (tokens [b, 1, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
CachedRead = Callable[[Array, Weights], Array]


def sum_cached_reads(
    read: CachedRead, x: Array, gates: Array, weights: Weights, segment: Array
) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`, skipping slots that no token of a block reads.

    A compiled program reads all slots, because the number of filled slots is dynamic.

    Args:
        read: function that reads several memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 where a token does not read a slot.
        weights: memories, each [b, n, h, o, i].
        segment: integers [b, c], number of slots that a token may read.

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    blocks = zip(
        x.split(BLOCK, dim=2), gates.split(BLOCK, dim=2), segment.split(BLOCK, dim=1), strict=True
    )
    return torch.cat([_sum_block(read, x, g, weights, torch.amax(s)) for x, g, s in blocks], dim=2)


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
        index: memories of each chunk, int64 [g, b, n]; m = none.

    Returns:
        [g, b, 1, h, c, o] in the gates' dtype.
    """
    row = torch.arange(index.shape[1], device=index.device)

    def gather(w: Array, which: Array, row: Array) -> Array:
        return w[row, which.clamp(max=w.shape[1] - 1)]

    @remat
    def weighted(x: Array, gate: Array, weights: Weights) -> Array:
        return gate[..., None] * read(x, tuple(w[:, :, None] for w in weights))

    total = None
    for which, gate in zip(index.unbind(-1), gates.unbind(-1), strict=True):
        is_read = (which < weights[0].shape[1]).any()
        if total is not None and not is_traced(is_read) and not is_read:
            continue
        memories = tuple(read_from_host(gather, w, which, row) for w in weights)
        part = weighted(x, gate, memories)
        total = part if total is None else total + part
    assert total is not None
    return total


def _sum_block(read: CachedRead, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
    """Compute `sum_cached_reads` for one block of tokens, over the first `filled` slots.

    Example: 17 tokens in segments of 4 have n = 5 slots. A call of 13 tokens reads 64 // 13 = 4
    slots per step. Token 12 in segment 3 reads slots 0 1 2: `filled` is 3, and one step reads them.
    A compiled program reads slots 0 1 2 3, then slot 4.
    """
    n, size = gates.shape[-1], min(gates.shape[-1], max(1, MAX_READS // gates.shape[2]))
    if not is_traced(filled):
        n = min(n, int(filled))
    x = x[:, None]

    @remat
    def weighted(x: Array, gates: Array, weights: Weights) -> Array:
        return torch.sum(gates.permute(0, 3, 1, 2)[..., None] * read(x, weights), dim=1)

    # `split` has a single backward; slicing would create a full gradient per block.
    parts = zip(
        gates[..., :n].split(size, dim=-1),
        *(w[:, :n].split(size, dim=1) for w in weights),
        strict=True,
    )
    total = None
    for part, *weight_blocks in parts:
        block_sum = weighted(x, part, tuple(w.to(x.device) for w in weight_blocks))
        total = block_sum if total is None else total + block_sum
    assert total is not None
    return total
