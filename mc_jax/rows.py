"""Rows of a cache: some of them, in any order, and those that an id out of range has ended."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.cache_checks import ENDED, caches_of, check_taken, to_indices
from mc_jax.host import put
from mc_jax.ids import check_ids, safe_ids
from mc_jax.numerics import Array

Rows = Sequence[int] | np.ndarray | Array


def take_rows(cache: Any, rows: Rows) -> Any:
    """Return the streams of some rows: reordered, repeated or without the others.

    In a compiled program, which cannot raise, a row out of range is a stream that gives NaN.

    Args:
        cache: of a layer, or of all blocks of a model.
        rows: integers [r], the row of each new stream; none leaves a cache of 0 streams.

    Returns:
        a cache of r streams. It shares no array with `cache`, which stays as it is.

    Raises:
        ValueError: rows that are no integers or not in `cache`.
    """
    caches = caches_of(cache)
    batch = caches[0].position.shape[0]
    chosen = rows if isinstance(rows, jax.Array) else to_indices(rows)
    check_taken(chosen, batch)
    known = check_ids("rows", chosen, batch)
    index, wrong = safe_ids(chosen, batch)
    new = tuple(_take(one, index)._replace(limit=jnp.copy(one.limit)) for one in caches)
    new = new if known else tuple(end_rows(one, wrong) for one in new)
    return new[0] if hasattr(cache, "limit") else new


def map_rows(function: Callable[[Array], Array], cache: Any) -> Any:
    """Apply a function to the arrays [b, ...] of a cache: all but its limit."""
    return jax.tree.map(function, cache._replace(limit=()))._replace(limit=cache.limit)


def end_rows(cache: Any, ended: Array) -> Any:
    """Make every later output of some rows, bool [b], NaN."""
    position = jnp.where(ended, jnp.full_like(cache.position, ENDED), cache.position)
    return cache._replace(position=position)


def add_row(x: Array) -> Array:
    """Append a row of zeros to x [b, ...]: [b + 1, ...]."""
    return put(lambda x: jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), x)


def drop_rows(x: Array) -> Array:
    """Return x [b, ...] without its rows: [0, ...]."""
    return put(lambda x: x[:0], x)


@jax.jit
def _take(cache: Any, index: Array) -> Any:
    def pick(x: Array) -> Array:
        return put(lambda x, index: jnp.take(x, index, axis=0, mode="clip"), x, index)

    return map_rows(pick, cache)
