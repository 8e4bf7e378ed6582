"""Selection and invalidation of rows of a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.cache_checks import INVALIDATED, block_caches, check_row_indices, to_row_indices
from mc_jax.ids import check_ids, safe_ids
from mc_jax.numerics import Array
from mc_jax.offload import update_in_place

Rows = Sequence[int] | np.ndarray | Array


def take_rows(cache: Any, rows: Rows) -> Any:
    """Return a cache with the streams of the given rows. Rows may be in any order and repeated.

    A compiled program cannot raise: an index out of range gives a stream with output NaN.

    Args:
        cache: cache of a layer, or of all blocks of a model.
        rows: integers [r], the source row of each new stream; an empty list gives 0 streams.

    Returns:
        a cache of r streams. It shares no array with `cache`, which is unchanged.

    Raises:
        ValueError: rows are not integers, or out of range.
    """
    caches = block_caches(cache)
    batch = caches[0].position.shape[0]
    indices = rows if isinstance(rows, jax.Array) else to_row_indices(rows)
    check_row_indices(indices, batch)
    in_range = check_ids("rows", indices, batch)
    index, out_of_range = safe_ids(indices, batch)
    new = tuple(
        _gather_rows(block_cache, index)._replace(capacity=jnp.copy(block_cache.capacity))
        for block_cache in caches
    )
    new = (
        new
        if in_range
        else tuple(invalidate_rows(block_cache, out_of_range) for block_cache in new)
    )
    return new[0] if hasattr(cache, "capacity") else new


def map_rows(function: Callable[[Array], Array], cache: Any) -> Any:
    """Apply a function to the arrays [b, ...] of a cache, which are all except `capacity`."""
    return jax.tree.map(function, cache._replace(capacity=()))._replace(capacity=cache.capacity)


def invalidate_rows(cache: Any, invalid: Array) -> Any:
    """Set all later outputs to NaN in the rows where `invalid` [b] is True."""
    position = jnp.where(invalid, jnp.full_like(cache.position, INVALIDATED), cache.position)
    return cache._replace(position=position)


def add_row(x: Array) -> Array:
    """Append a row of zeros to x [b, ...]: [b + 1, ...]."""
    return update_in_place(lambda x: jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), x)


def drop_rows(x: Array) -> Array:
    """Return x [b, ...] without its rows: [0, ...]."""
    return update_in_place(lambda x: x[:0], x)


@jax.jit
def _gather_rows(cache: Any, index: Array) -> Any:
    def pick(x: Array) -> Array:
        return update_in_place(lambda x, index: jnp.take(x, index, axis=0, mode="clip"), x, index)

    return map_rows(pick, cache)
