"""Selection and invalidation of rows of a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mc_core.cache_checks import INVALIDATED, block_caches, check_row_indices, to_row_indices
from mc_torch.ids import check_ids, safe_ids
from mc_torch.numerics import Array, tree_map
from mc_torch.offload import update_in_place

Rows = Sequence[int] | np.ndarray | Array


def take_rows(cache: Any, rows: Rows) -> Any:
    """Return a cache with the streams of the given rows. Rows may be in any order and repeated.

    A compiled program cannot raise: an index out of range gives a stream with output NaN.

    Args:
        cache: cache of a layer, or of all blocks of a model.
        rows: integers [r], the source row of each new stream; an empty list gives 0 streams.

    Returns:
        a cache of r streams. It shares no tensor with `cache`, which is unchanged.

    Raises:
        ValueError: rows are not integers, or out of range.
    """
    caches = block_caches(cache)
    batch = caches[0].position.shape[0]
    indices = rows if isinstance(rows, torch.Tensor) else torch.as_tensor(to_row_indices(rows))
    check_row_indices(indices, batch)
    in_range = check_ids("rows", indices, batch)
    index, out_of_range = safe_ids(indices.to(caches[0].position.device), batch)
    new = tuple(
        _gather_rows(block_cache, index)._replace(capacity=block_cache.capacity.clone())
        for block_cache in caches
    )
    new = (
        new
        if in_range
        else tuple(invalidate_rows(block_cache, out_of_range) for block_cache in new)
    )
    return new[0] if hasattr(cache, "capacity") else new


def map_rows(function: Callable[[Array], Array], cache: Any) -> Any:
    """Apply a function to the tensors [b, ...] of a cache, that is all but its capacity."""
    return tree_map(function, cache._replace(capacity=()))._replace(capacity=cache.capacity)


def invalidate_rows(cache: Any, invalid: Array) -> Any:
    """Set all later outputs to NaN in the rows where `invalid` [b] is True."""
    return cache._replace(position=torch.where(invalid, INVALIDATED, cache.position))


def add_row(x: Array) -> Array:
    """Append a row of zeros to x [b, ...]: [b + 1, ...]."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def drop_rows(x: Array) -> Array:
    """Return x [b, ...] without its rows: [0, ...]."""
    return x[:0]


def _gather_rows(cache: Any, index: Array) -> Any:
    gathered: dict[int, Array] = {}

    def pick(x: Array) -> Array:
        # Leaves that share a tensor still share it: compiled steps depend on it.
        if id(x) not in gathered:
            gathered[id(x)] = update_in_place(
                lambda x, index: torch.index_select(x, 0, index), x, index
            )
        return gathered[id(x)]

    return map_rows(pick, cache)
