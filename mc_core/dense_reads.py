"""Tiling of the (segment, earlier memory) pairs into square blocks."""

from typing import NamedTuple

import numpy as np


class PairTiles(NamedTuple):
    """Square tiles of one size.

    Tile a pairs the `half` memories that start at `2 a half` with the segments that start at
    `(2 a + 1) half`.
    """

    half: int  # memories per tile
    number: int  # number of tiles
    rows: int  # segments per tile

    @property
    def memories(self) -> np.ndarray:
        """[number, half] indices of each tile's memories."""
        return 2 * self.half * np.arange(self.number)[:, None] + np.arange(self.half)

    @property
    def segments(self) -> np.ndarray:
        """[number, rows] indices of each tile's segments; may exceed the last segment."""
        return 2 * self.half * np.arange(self.number)[:, None] + self.half + np.arange(self.rows)


def tile_pairs(n: int) -> list[PairTiles]:
    """Return tiles that cover each pair of n segments exactly once, in order of size.

    Example: 4 segments have 6 pairs. Tiles of size 1 pair segment 1 with memory 0 and segment 3
    with memory 2; one tile of size 2 pairs segments 2 and 3 with memories 0 and 1.
    """
    tiles, half = [], 1
    while half < n:
        number = len(range(half, n, 2 * half))
        # A single tile ends at the last segment; several are padded to the same shape.
        tiles.append(PairTiles(half, number, min(half, n - half) if number == 1 else half))
        half *= 2
    return tiles


def count_pairs(n: int) -> int:
    """Return the number of (segment, memory) pairs in all tiles, including padding."""
    return sum(tile.number * tile.rows * tile.half for tile in tile_pairs(n))
