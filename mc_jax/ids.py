"""Range checks of token ids and indices, and safe lookups for compiled programs.

A compiled program cannot raise. Instead, an id out of range reads row 0, and the caller sets all
dependent outputs to NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mc_core import checks
from mc_jax.numerics import Array


def check_ids(
    name: str,
    ids: Array | np.ndarray,
    size: int,
    mask: Array | np.ndarray | None = None,
    values: bool = True,
) -> bool:
    """Check that ids or indices are in `0..size - 1`.

    Synchronizes with the device that computes the ids.

    Args:
        name: name of the argument.
        ids: integers [...], any shape.
        size: number of ids.
        mask: bool, same shape as `ids`, False at ids to ignore; None = check all.
        values: False checks only the dtype.

    Returns:
        True if the ids are in range; False if their values are not available, in a compiled program
        or on other processes.

    Raises:
        ValueError: the ids are not integers, or one is out of range.
    """
    checks.check_integers(name, ids.dtype.name)
    if not (values and _is_available(ids) and _is_available(mask)):
        return False
    checks.check_ids(name, np.asarray(ids), size, None if mask is None else np.asarray(mask))
    return True


def safe_ids(
    ids: Array | np.ndarray, size: int, mask: Array | np.ndarray | None = None
) -> tuple[Array, Array]:
    """Replace ids that are out of range or masked by 0.

    Args:
        ids: integers [...] of any dtype and shape.
        size: number of ids.
        mask: as in `check_ids`.

    Returns:
        ids, int32, and bool, True at unmasked ids that are out of range.
    """
    ids = jnp.asarray(ids)
    # Compared in the dtype of the ids, which may be too small to represent `size`.
    last = min(size - 1, int(jnp.iinfo(ids.dtype).max))
    inside = (ids >= 0) & (ids <= jnp.asarray(last, ids.dtype))
    readable, out_of_range = inside, ~inside
    if mask is not None:
        readable, out_of_range = inside & mask, out_of_range & mask
    return jnp.where(readable, ids, jnp.zeros_like(ids)).astype(jnp.int32), out_of_range


def cumulative_any(mask: Array) -> Array:
    """Return the cumulative logical or of `mask` [b, t] along its rows: bool [b, t]."""
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) > 0


def safe_places(
    places: Array | np.ndarray, invalid: Array | None, tokens: int
) -> tuple[Array, Array | None]:
    """Return places [b, p] in range, and the mask of logits to set to NaN.

    Args:
        places: integers [b, p].
        invalid: bool [b, t], True at tokens with logits NaN; None = none.
        tokens: t.

    Returns:
        places, and bool [b, p]; None = none.

    Raises:
        ValueError: see `check_ids`.
    """
    in_range = check_ids("places", places, tokens)
    places, out_of_range = safe_ids(places, tokens)
    if invalid is None:
        return places, None if in_range else out_of_range
    return places, out_of_range | jnp.take_along_axis(invalid, places, axis=1)


def nan_where(invalid: Array | None, x: Array) -> Array:
    """Set `x` [b, t, ...] to NaN where `invalid` [b, t] is True; None = no change."""
    if invalid is None:
        return x
    invalid = invalid.reshape(invalid.shape + (1,) * (x.ndim - 2))
    return jnp.where(invalid, jnp.full_like(x, jnp.nan), x)


def _is_available(x: Array | np.ndarray | None) -> bool:
    """Return True if this process can read the values of an array."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
