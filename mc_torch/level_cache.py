"""Streaming state of a log-linear attention layer."""

from typing import Any, NamedTuple

import torch

from mc_torch.backends import Weights
from mc_torch.cache_rows import Rows, take_rows
from mc_torch.numerics import Array, tree_map


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # PyTorch cannot deep-copy non-leaf tensors.
        return tree_map(lambda x: x.detach().clone(), self)


# `torch.load(..., weights_only=True)` reads a cache that `torch.save` wrote.
torch.serialization.add_safe_globals([LevelCache])
