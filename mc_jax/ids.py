"""Range checks of token ids and indices, and safe lookups where the values are unknown.

A compiled program cannot raise. There, an id out of range reads row 0, and the caller sets all
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
    read: Array | np.ndarray | None = None,
    values: bool = True,
) -> bool:
    """Check that ids or indices are in `0..size - 1`.

    Synchronizes with the device that computes the ids.

    Args:
        name: name of the argument.
        ids: integers [...], any shape.
        size: number of ids.
        read: bool, same shape as `ids`, False at ids that are not checked; None = check all.
        values: False checks only the dtype.

    Returns:
        True where the ids are known to be in range; False where only a compiled program, or other
        processes, know them.

    Raises:
        ValueError: the ids are not integers, or one is out of range.
    """
    checks.check_integers(name, ids.dtype.name)
    if not (values and _is_known(ids) and _is_known(read)):
        return False
    checks.check_ids(name, np.asarray(ids), size, None if read is None else np.asarray(read))
    return True


def safe_ids(
    ids: Array | np.ndarray, size: int, read: Array | np.ndarray | None = None
) -> tuple[Array, Array]:
    """Replace ids that are out of range or not read by 0.

    Args:
        ids: integers [...] of any dtype and shape.
        size: number of ids.
        read: as in `check_ids`.

    Returns:
        ids, int32, and bool, True at ids that are read and out of range.
    """
    ids = jnp.asarray(ids)
    # Compared in the dtype of the ids, which may be too small to represent `size`.
    last = min(size - 1, int(jnp.iinfo(ids.dtype).max))
    inside = (ids >= 0) & (ids <= jnp.asarray(last, ids.dtype))
    readable, wrong = inside, ~inside
    if read is not None:
        readable, wrong = inside & read, wrong & read
    return jnp.where(readable, ids, jnp.zeros_like(ids)).astype(jnp.int32), wrong


def any_before(wrong: Array) -> Array:
    """Return bool [b, t], True from the first True of each row of `wrong` [b, t] on."""
    return jnp.cumsum(wrong, axis=1, dtype=jnp.int32) > 0


def safe_places(
    places: Array | np.ndarray, invalid: Array | None, tokens: int
) -> tuple[Array, Array | None]:
    """Return places [b, p] in range, and a mask of those whose logits must be NaN.

    Args:
        places: integers [b, p].
        invalid: bool [b, t], True at tokens whose logits must be NaN; None = nowhere.
        tokens: t.

    Returns:
        places, and bool [b, p] or None = nowhere.

    Raises:
        ValueError: see `check_ids`.
    """
    known = check_ids("places", places, tokens)
    places, wrong = safe_ids(places, tokens)
    if invalid is None:
        return places, None if known else wrong
    return places, wrong | jnp.take_along_axis(invalid, places, axis=1)


def nan_where(wrong: Array | None, x: Array) -> Array:
    """Set `x` [b, t, ...] to NaN where `wrong` [b, t] is True; None = nowhere."""
    if wrong is None:
        return x
    wrong = wrong.reshape(wrong.shape + (1,) * (x.ndim - 2))
    return jnp.where(wrong, jnp.full_like(x, jnp.nan), x)


def _is_known(x: Array | np.ndarray | None) -> bool:
    """Return True if this process can read the values of an array."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
