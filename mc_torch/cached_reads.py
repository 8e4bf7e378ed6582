"""Sums over the cached memories of a stream, of which only the first slots are filled."""

from collections.abc import Callable

import torch

from mc_torch.backends import Weights
from mc_torch.cache import is_traced
from mc_torch.numerics import Array, remat

READS = 64  # slots per step are READS / tokens
RUN = 256  # tokens per run; a run reads the slots up to the last one that any of its tokens reads

# (tokens [b, 1, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
CachedRead = Callable[[Array, Weights], Array]


def sum_cached_reads(
    read: CachedRead, x: Array, gates: Array, weights: Weights, segment: Array
) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`, skipping slots that no token of a run reads.

    A compiled program reads all slots, because it does not know which are filled.

    Args:
        read: function that reads several memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 where a token does not read a slot.
        weights: memories, each [b, n, h, o, i].
        segment: integers [b, c], number of slots that a token may read.

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    runs = zip(x.split(RUN, dim=2), gates.split(RUN, dim=2), segment.split(RUN, dim=1), strict=True)
    return torch.cat([_sum_run(read, x, g, weights, torch.amax(s)) for x, g, s in runs], dim=2)


def _sum_run(read: CachedRead, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
    """Compute `sum_cached_reads` for one run of tokens, over the first `filled` slots, in blocks.

    Example: 17 tokens in segments of 4 have n = 5 slots. A call of 13 tokens reads 64 // 13 = 4
    slots per step. Token 12 in segment 3 reads slots 0 1 2: `filled` is 3, and one step reads them.
    A compiled program reads slots 0 1 2 3, then slot 4.
    """
    n, size = gates.shape[-1], min(gates.shape[-1], max(1, READS // gates.shape[2]))
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
