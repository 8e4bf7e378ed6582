"""Weighted sums of reads of a stream's cached memories, which fill only the first slots."""

from collections.abc import Callable

import torch

from mc_torch.backends import Weights
from mc_torch.cache import is_traced
from mc_torch.numerics import Array, remat

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
