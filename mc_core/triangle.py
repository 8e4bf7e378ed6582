"""The triangle of pairs of a segment and an earlier memory, cut into squares of few sizes."""

from typing import NamedTuple

import numpy as np


class Squares(NamedTuple):
    """Squares of one size, side by side.

    Square a pairs the memories from `2 a half` on with the segments from `(2 a + 1) half` on.
    """

    half: int  # memories of each
    number: int  # of squares
    rows: int  # segments of each

    @property
    def memories(self) -> np.ndarray:
        """[number, half] the memories of each square."""
        return 2 * self.half * np.arange(self.number)[:, None] + np.arange(self.half)

    @property
    def segments(self) -> np.ndarray:
        """[number, rows] the segments of each square; past the last one where there is none."""
        return 2 * self.half * np.arange(self.number)[:, None] + self.half + np.arange(self.rows)


def cut_triangle(n: int) -> list[Squares]:
    """Return the squares that hold every pair of n segments once, the smallest first.

    13 tokens in segments of 4 are 4 segments. In squares of 1, segment 1 reads memory 0 and segment
    3 memory 2; in one of 2, segments 2 and 3 read memories 0 and 1: all 6 pairs.
    """
    squares, half = [], 1
    while half < n:
        number = len(range(half, n, 2 * half))
        # A square that stands alone ends at the last segment; others are padded to one shape.
        squares.append(Squares(half, number, min(half, n - half) if number == 1 else half))
        half *= 2
    return squares


def pairs_read(n: int) -> int:
    """Count the (segment, memory) pairs that the squares of n segments hold, padding included."""
    return sum(one.number * one.rows * one.half for one in cut_triangle(n))
