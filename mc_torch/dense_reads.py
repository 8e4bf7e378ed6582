"""Sums over all pairs of a segment and an earlier memory, at half the cost of the masked square.

The causal triangle of pairs is split recursively into square tiles: the later half of the segments
reads the earlier half of the memories, then both halves are split in the same way. All tiles of one
size run in one loop over their memories, so each matrix product covers all tokens of a tile.
"""

from collections.abc import Callable

import torch.nn.functional as F

from mc_core.dense_reads import PairTiles, tile_pairs
from mc_torch.backends import Weights
from mc_torch.numerics import Array, remat, unfold, unstack

# (tokens [a, b, h, c, i], gates [a, b, h, c], weights each [a, b, h, o, i]) -> weighted reads
# [a, b, h, c, o]; a is the number of tiles
TileRead = Callable[[Array, Array, Weights], Array]


def sum_earlier_reads(read: TileRead, x: Array, gates: Array, weights: Weights) -> Array:
    """Return `Σ_{i<s} read(x, gates_i, weights_i)` for the tokens of each segment s.

    Args:
        read: function that reads one memory, weighted by the gates.
        x: tokens of each segment [b, h, n, c, i], n >= 2.
        gates: [b, h, n, c, n]; the last axis is the memory.
        weights: memories, each [b, n, h, o, i].

    Returns:
        [b, h, n, c, o] in the gates' dtype.
    """
    total = None
    for tiles in tile_pairs(x.shape[2]):
        memories = tuple(_memories(w, tiles) for w in weights)
        part = _sum_tiles(read, x, _tile_gates(gates, tiles), memories, tiles)
        total = part if total is None else total + part
    assert total is not None
    return total


def sum_bucket_reads(read: TileRead, x: Array, gates: Array, weights: Weights) -> Array:
    """Return the sum over each segment's buckets of `read(x, gates, weights)`.

    The bucket of 2^e segments that a segment reads is the last memory of its tile of size 2^e.

    Args:
        read: function that reads one memory, weighted by the gates.
        x: tokens of each segment [b, h, n, c, i], n >= 2.
        gates: [b, h, n, c, slots]; the last axis is the exponent e.
        weights: bucket that ends with each segment, each [b, n, h, o, i].

    Returns:
        [b, h, n, c, o] in the gates' dtype.
    """
    total = None
    for exponent, tiles in enumerate(tile_pairs(x.shape[2])):
        gate = _rows(gates[..., exponent], tiles)  # [b, h, a, c, rows]
        gate = gate.permute(2, 0, 1, 4, 3).flatten(3)[None]
        last = tuple(_memories(w, tiles)[-1:] for w in weights)
        part = _sum_tiles(read, x, gate, last, tiles)
        total = part if total is None else total + part
    assert total is not None
    return total


def _sum_tiles(
    read: TileRead, x: Array, gates: Array, memories: Weights, tiles: PairTiles
) -> Array:
    """Sum the reads of tiles: [b, h, n, c, o], 0 at segments in no tile.

    Takes x [b, h, n, c, i], gates [m, a, b, h, rows * c] and memories [m, a, b, h, o, i].
    """
    (half, _, rows), n = tiles, x.shape[2]
    part = _read_tiles(read, _rows(x, tiles), gates, memories)  # [b, h, a, rows, c, o]
    part = F.pad(part, (0, 0, 0, 0, 0, 2 * half - rows)).flatten(2, 3)
    return F.pad(part, (0, 0, 0, 0, half, n - half - part.shape[2]))


def _tile_gates(gates: Array, tiles: PairTiles) -> Array:
    """Gather the gates of tiles [half, a, b, h, rows * c] from [b, h, n, c, n]."""
    gates = unfold(gates, 4, tiles.half, 2 * tiles.half)[..., : tiles.number, :]
    gates = _rows(gates, tiles)  # [b, h, a, c, a, half, rows]
    return gates.diagonal(dim1=2, dim2=4).permute(3, 5, 0, 1, 4, 2).flatten(4)


def _rows(x: Array, tiles: PairTiles) -> Array:
    """Gather the segments of tiles [b, h, a, c, i, rows] from [b, h, n, c, i], zero-padded."""
    half, number, rows = tiles
    x = x[:, :, half:]
    missing = (number - 1) * 2 * half + rows - x.shape[2]
    if missing > 0:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return unfold(x, 2, rows, 2 * half)


def _memories(weights: Array, tiles: PairTiles) -> Array:
    """Gather the memories of tiles [half, a, b, h, o, i] from [b, n, h, o, i], as a view."""
    memories = unfold(weights, 1, tiles.half, 2 * tiles.half)[:, : tiles.number]
    return memories.permute(5, 1, 0, 2, 3, 4)


def _read_tiles(read: TileRead, x: Array, gates: Array, weights: Weights) -> Array:
    b, h, a, c, i, rows = x.shape
    x = x.permute(2, 0, 1, 5, 3, 4).reshape(a, b, h, rows * c, i)

    # The backward pass recomputes the reads; only their inputs are saved.
    total = None
    for gate, memory in unstack((gates, weights)):
        part = remat(read)(x, gate, memory)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(a, b, h, rows, c, -1).permute(1, 2, 0, 3, 4, 5)
