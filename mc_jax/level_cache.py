"""Streaming state of a log-linear attention layer."""

from typing import NamedTuple

from mc_jax.backends import Weights
from mc_jax.cache_rows import Rows, take_rows
from mc_jax.numerics import Array


class LevelCache(NamedTuple):
    """State of the streams of a log-linear attention layer. Rows are independent.

    Levels are those seen from the last token: 0 is this token, and level i + 1 is a block of 2^i
    earlier tokens.
    """

    state: Array  # decayed sum of v kᵀ per level [b, h, l, v, k]
    position: Array  # number of processed tokens, including masked ones, int32 [b]
    capacity: Array  # maximum number of tokens, int32 []
    conv: Weights = ()  # last inputs of the convolutions of q, k and v, each [b, width - 1, d]

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads h and head width k."""
        return self.state.shape[1], self.state.shape[4]

    def take(self, rows: Rows) -> "LevelCache":
        """Return a cache with the streams of the given rows; see `take_rows`."""
        return take_rows(self, rows)
