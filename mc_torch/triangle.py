"""Sums over all pairs of a segment and an earlier memory, at half the work of the masked square.

The triangle of pairs is cut into squares: the upper half of the segments reads the lower half of
the memories, then both halves are cut in the same way, side by side. Squares of one size run
together in one loop over their memories, so each product spans all of a square's tokens.
"""

from collections.abc import Callable

import torch.nn.functional as F

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
    total, half = None, 1
    while half < n:
        squares, rows = _squares(n, half)
        part = _read_squares(
            read,
            _rows(x, squares, rows, half),
            _gates_of(gates, squares, rows, half),
            tuple(_memories(w, squares, half) for w in weights),
        )  # [b, h, a, rows, c, o]
        part = F.pad(part, (0, 0, 0, 0, 0, 2 * half - rows)).flatten(2, 3)
        part = F.pad(part, (0, 0, 0, 0, half, n - half - part.shape[2]))
        total = part if total is None else total + part
        half *= 2
    assert total is not None
    return total


def pairs_read(n: int) -> int:
    """Count the (segment, memory) pairs that `sum_over_earlier` reads for n segments."""
    count, half = 0, 1
    while half < n:
        squares, rows = _squares(n, half)
        count += squares * rows * half
        half *= 2
    return count


def _squares(n: int, half: int) -> tuple[int, int]:
    """Return the number of squares of one size, and their rows.

    Square a has the memories from 2a·half on and the segments from (2a + 1)·half on.
    """
    squares = len(range(half, n, 2 * half))
    # A square that stands alone is cut off at the last segment; others are padded to one shape.
    return squares, min(half, n - half) if squares == 1 else half


def _rows(x: Array, squares: int, rows: int, half: int) -> Array:
    """Take [b, h, a, c, i, rows] from [b, h, n, c, i]; zeros past the last segment."""
    x = x[:, :, half:]
    missing = (squares - 1) * 2 * half + rows - x.shape[2]
    if missing > 0:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    return windows(x, 2, rows, 2 * half)


def _memories(weights: Array, squares: int, half: int) -> Array:
    """Take [half, a, b, h, o, i] from [b, n, h, o, i], as a view."""
    return windows(weights, 1, half, 2 * half)[:, :squares].permute(5, 1, 0, 2, 3, 4)


def _gates_of(gates: Array, squares: int, rows: int, half: int) -> Array:
    """Take [half, a, b, h, rows * c] from [b, h, n, c, n]."""
    gates = windows(gates, 4, half, 2 * half)[..., :squares, :]
    gates = _rows(gates, squares, rows, half)  # [b, h, a, c, a, half, rows]
    return gates.diagonal(dim1=2, dim2=4).permute(3, 5, 0, 1, 4, 2).flatten(4)


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
