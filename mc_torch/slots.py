"""Sums over the slots of a stream's cached memories, of which only the first ones are filled."""

from collections.abc import Callable

import torch

from mc_torch.backends import Weights
from mc_torch.cache import is_traced
from mc_torch.numerics import Array, remat

READS = 64  # of one token each that a step takes together: few tokens read many slots at once
RUN = 256  # tokens that go through the slots together, to the last one that any of them reads

# (tokens [b, 1, h, c, i], weights each [b, s, h, o, i]) -> [b, s, h, c, o]
SlotRead = Callable[[Array, Weights], Array]


def sum_over_slots(
    read: SlotRead, x: Array, gates: Array, weights: Weights, segment: Array
) -> Array:
    """Return `Σ_i gates_i read(x, weights_i)`; slots that no token of a run reads cost nothing.

    A compiled program reads them too: only the host could tell how many there are.

    Args:
        read: how tokens read some memories.
        x: tokens [b, h, c, i].
        gates: [b, h, c, n], 0 at slots that a token does not read.
        weights: memories, each [b, n, h, o, i].
        segment: integers [b, c], one past the last slot that a token reads.

    Returns:
        [b, h, c, o] in the gates' dtype.
    """
    runs = zip(x.split(RUN, dim=2), gates.split(RUN, dim=2), segment.split(RUN, dim=1), strict=True)
    return torch.cat([_sum_run(read, x, g, weights, torch.amax(s)) for x, g, s in runs], dim=2)


def _sum_run(read: SlotRead, x: Array, gates: Array, weights: Weights, filled: Array) -> Array:
    """Do the same for one run of tokens, a block of slots at a step, up to the slot `filled`.

    A stream with room for 17 tokens in segments of 4 has n = 5 slots, of which a call of 13 tokens
    reads 64 // 13 = 4 at a step. Token 12 is in segment 3 and reads slots 0 1 2, so that `filled`
    is 3: one step reads them. A compiled program reads slots 0 1 2 3, then slot 4.
    """
    n, size = gates.shape[-1], min(gates.shape[-1], max(1, READS // gates.shape[2]))
    if not is_traced(filled):
        n = min(n, int(filled))
    x = x[:, None]

    @remat
    def weighted(x: Array, gates: Array, weights: Weights) -> Array:
        return torch.sum(gates.permute(0, 3, 1, 2)[..., None] * read(x, weights), dim=1)

    # Split at once: slicing block by block would add a full gradient for every one.
    parts = zip(
        gates[..., :n].split(size, dim=-1),
        *(w[:, :n].split(size, dim=1) for w in weights),
        strict=True,
    )
    total = None
    for part, *some in parts:
        more = weighted(x, part, tuple(w.to(x.device) for w in some))
        total = more if total is None else total + more
    assert total is not None
    return total
