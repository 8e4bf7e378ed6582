"""Rows of a cache: some of them, in any order, and those that an id out of range has ended."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mc_core.cache_checks import ENDED, caches_of, check_taken, to_indices
from mc_torch.host import put
from mc_torch.ids import check_ids, safe_ids
from mc_torch.numerics import Array, tree_map

Rows = Sequence[int] | np.ndarray | Array


def take_rows(cache: Any, rows: Rows) -> Any:
    """Return the streams of some rows: reordered, repeated or without the others.

    In a compiled program, which cannot raise, a row out of range is a stream that gives NaN.

    Args:
        cache: of a layer, or of all blocks of a model.
        rows: integers [r], the row of each new stream; none leaves a cache of 0 streams.

    Returns:
        a cache of r streams. It shares no tensor with `cache`, which stays as it is.

    Raises:
        ValueError: rows that are no integers or not in `cache`.
    """
    caches = caches_of(cache)
    batch = caches[0].position.shape[0]
    chosen = rows if isinstance(rows, torch.Tensor) else torch.as_tensor(to_indices(rows))
    check_taken(chosen, batch)
    known = check_ids("rows", chosen, batch)
    index, wrong = safe_ids(chosen.to(caches[0].position.device), batch)
    new = tuple(_take(one, index)._replace(limit=one.limit.clone()) for one in caches)
    new = new if known else tuple(end_rows(one, wrong) for one in new)
    return new[0] if hasattr(cache, "limit") else new


def map_rows(function: Callable[[Array], Array], cache: Any) -> Any:
    """Apply a function to the tensors [b, ...] of a cache: all but its limit."""
    return tree_map(function, cache._replace(limit=()))._replace(limit=cache.limit)


def end_rows(cache: Any, ended: Array) -> Any:
    """Make every later output of some rows, bool [b], NaN."""
    return cache._replace(position=torch.where(ended, ENDED, cache.position))


def add_row(x: Array) -> Array:
    """Append a row of zeros to x [b, ...]: [b + 1, ...]."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


def drop_rows(x: Array) -> Array:
    """Return x [b, ...] without its rows: [0, ...]."""
    return x[:0]


def _take(cache: Any, index: Array) -> Any:
    taken: dict[int, Array] = {}

    def pick(x: Array) -> Array:
        # A tensor at two places stays one: a step is compiled for it.
        if id(x) not in taken:
            taken[id(x)] = put(lambda x, index: torch.index_select(x, 0, index), x, index)
        return taken[id(x)]

    return map_rows(pick, cache)
