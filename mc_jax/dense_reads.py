"""Sums over all pairs of a segment and an earlier memory, at half the cost of the masked square.

The causal (lower triangular) set of pairs is split recursively into square tiles: the second half
of the segments reads the first half of the memories, then both halves are split in the same way.
One scan over memories processes all tiles of one size. It copies no weights, and each matrix
product covers all tokens of a tile.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.dense_reads import PairTiles, tile_pairs
from mc_jax.backends import Weights
from mc_jax.numerics import Array

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
        memories = tuple(w[:, tiles.memories] for w in weights)
        total = _add_tiles(read, x, _tile_gates(gates, tiles), memories, tiles, total)
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
        gate = gates[..., exponent][:, :, tiles.segments.clip(max=x.shape[2] - 1)]
        gate = gate.transpose(2, 0, 1, 3, 4)  # [a, b, h, rows, c]
        gate = gate.reshape(1, *gate.shape[:3], -1)
        last = tuple(w[:, tiles.memories[:, -1:]] for w in weights)
        total = _add_tiles(read, x, gate, last, tiles, total)
    assert total is not None
    return total


def _add_tiles(
    read: TileRead,
    x: Array,
    gates: Array,
    memories: Weights,
    tiles: PairTiles,
    total: Array | None,
) -> Array:
    """Add the reads of tiles to a sum [b, h, n, c, o]; None = zero.

    Takes x [b, h, n, c, i], gates [m, a, b, h, rows * c] and memories [b, a, m, h, o, i].
    """
    b, h, n, c, _ = x.shape
    rows = tiles.segments
    part = _read_tiles(read, x[:, :, rows.clip(max=n - 1)], gates, memories)
    part = part.reshape(b, h, rows.size, c, -1)
    if total is None:
        total = jnp.zeros_like(part, shape=(b, h, n, c, part.shape[-1]))
    inside = rows.reshape(-1) < n
    valid = part if inside.all() else part[:, :, np.flatnonzero(inside)]
    return total.at[:, :, rows.reshape(-1)[inside]].add(valid)


def _tile_gates(gates: Array, tiles: PairTiles) -> Array:
    """Gather the gates of tiles [half, a, b, h, rows * c] from [b, h, n, c, n]."""
    rows = tiles.segments.clip(max=gates.shape[2] - 1)
    gathered = gates[:, :, rows[:, :, None], :, tiles.memories[:, None, :]]
    a, r, m, b, h, c = gathered.shape  # advanced indices come first
    return gathered.transpose(2, 0, 3, 4, 1, 5).reshape(m, a, b, h, r * c)


def _read_tiles(read: TileRead, x: Array, gates: Array, weights: Weights) -> Array:
    b, h, a, r, c, i = x.shape
    x = x.transpose(2, 0, 1, 3, 4, 5).reshape(a, b, h, r * c, i)
    memories = tuple(w.transpose(2, 1, 0, 3, 4, 5) for w in weights)

    # The backward pass recomputes the reads; only their inputs are saved.
    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, gate: Array, memory: Weights) -> Array:
        return read(x, gate, memory)

    def step(total: Array, inputs: tuple[Array, Weights]) -> tuple[Array, None]:
        gate, memory = inputs
        return total + weighted(x, gate, memory), None

    first = jax.tree.map(lambda m: m[0], (gates, memories))
    if len(gates) == 1:
        total = weighted(x, *first)
    else:
        shape = jax.eval_shape(weighted, x, *first).shape
        total, _ = jax.lax.scan(step, jnp.zeros_like(gates, shape=shape), (gates, memories))
    return total.reshape(a, b, h, r, c, -1).transpose(1, 2, 0, 3, 4, 5)
