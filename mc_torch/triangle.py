"""Sums over all pairs of a segment and an earlier memory, at half the work of the masked square.

The triangle of pairs is cut into squares: the upper half of the segments reads the lower half of
the memories, then both halves are cut in the same way, side by side. Squares of one size run
together in one loop over their memories, so each product spans all of a square's tokens.
"""

from collections.abc import Callable

import torch.nn.functional as F

from mc_core.triangle import Squares, cut_triangle
from mc_torch.backends import Weights
from mc_torch.numerics import Array, remat, unstack, windows

# (tokens [a, b, h, c, i], gates [a, b, h, c], weights each [a, b, h, o, i]) -> weighted reads
# [a, b, h, c, o]; a: squares side by side
BlockRead = Callable[[Array, Array, Weights], Array]


def sum_over_earlier(read: BlockRead, x: Array, gates: Array, weights: Weights) -> Array:
    """Return, for the tokens of each segment s, `Σ_{i<s} read(x, gates_i, weights_i)`.

    Args:
        read: how tokens read one memory, weighted by their gates.
        x: tokens by segment [b, h, n, c, i], n >= 2.
        gates: [b, h, n, c, n], entry (s, i) weighs memory i for a token of segment s.
        weights: memories, each [b, n, h, o, i].

    Returns:
        [b, h, n, c, o] in the gates' dtype.
    """
    n = x.shape[2]
    total = None
    for squares in cut_triangle(n):
        half, _, rows = squares
        part = _read_squares(
            read,
            _rows(x, squares),
            _gates_of(gates, squares),
            tuple(_memories(w, squares) for w in weights),
        )  # [b, h, a, rows, c, o]
        part = F.pad(part, (0, 0, 0, 0, 0, 2 * half - rows)).flatten(2, 3)
        part = F.pad(part, (0, 0, 0, 0, half, n - half - part.shape[2]))
        total = part if total is None else total + part
    assert total is not None
    return total


def _gates_of(gates: Array, squares: Squares) -> Array:
    """Take [half, a, b, h, rows * c] from [b, h, n, c, n]."""
    gates = windows(gates, 4, squares.half, 2 * squares.half)[..., : squares.number, :]
    gates = _rows(gates, squares)  # [b, h, a, c, a, half, rows]
    return gates.diagonal(dim1=2, dim2=4).permute(3, 5, 0, 1, 4, 2).flatten(4)


def _rows(x: Array, squares: Squares) -> Array:
    """Take [b, h, a, c, i, rows] from [b, h, n, c, i]; zeros past the last segment."""
    half, number, rows = squares
    x = x[:, :, half:]
    missing = (number - 1) * 2 * half + rows - x.shape[2]
    if missing > 0:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return windows(x, 2, rows, 2 * half)


def _memories(weights: Array, squares: Squares) -> Array:
    """Take [half, a, b, h, o, i] from [b, n, h, o, i], as a view."""
    memories = windows(weights, 1, squares.half, 2 * squares.half)[:, : squares.number]
    return memories.permute(5, 1, 0, 2, 3, 4)


def _read_squares(read: BlockRead, x: Array, gates: Array, weights: Weights) -> Array:
    b, h, a, c, i, rows = x.shape
    x = x.permute(2, 0, 1, 5, 3, 4).reshape(a, b, h, rows * c, i)

    # Only the tokens and one memory are kept for the backward pass, never a product's result.
    total = None
    for gate, memory in unstack((gates, weights)):
        part = remat(read)(x, gate, memory)
        total = part if total is None else total + part
    assert total is not None
    return total.reshape(a, b, h, rows, c, -1).permute(1, 2, 0, 3, 4, 5)
