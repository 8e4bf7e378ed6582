"""Token ids and indices: a check where their values are known, a safe look-up where they are not.

A compiled program cannot raise. There an id out of range reads row 0, and the caller puts NaN in
the place of all that follows from it.
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
    """Refuse ids or indices outside of `0..size - 1`.

    Waits for the ids where a device has yet to compute them.

    Args:
        name: of the argument.
        ids: integers [...], any shape.
        size: number of ids.
        read: bool, the shape of `ids`: False where an id is not looked at; None = all are.
        values: False checks the dtype alone.

    Returns:
        True where the ids are known to be in range; False where only a compiled program, or other
        processes, know them.

    Raises:
        ValueError: no integers, or names the first id that is out of range, and its position.
    """
    checks.check_integers(name, ids.dtype.name)
    if not (values and _is_known(ids) and _is_known(read)):
        return False
    checks.check_ids(name, np.asarray(ids), size, None if read is None else np.asarray(read))
    return True


def safe_ids(
    ids: Array | np.ndarray, size: int, read: Array | np.ndarray | None = None
) -> tuple[Array, Array]:
    """Return ids that are all in range: 0 where one is not read or was out of range.

    Args:
        ids: integers [...] of any dtype and shape.
        size: number of ids.
        read: as `check_ids` takes it.

    Returns:
        ids, int32, and bool, True where one that is read was out of range.
    """
    ids = jnp.asarray(ids)
    # In the dtype of the ids, which may be too small for `size`.
    last = min(size - 1, int(jnp.iinfo(ids.dtype).max))
    inside = (ids >= 0) & (ids <= jnp.asarray(last, ids.dtype))
    kept, wrong = inside, ~inside
    if read is not None:
        kept, wrong = inside & read, wrong & read
    return jnp.where(kept, ids, jnp.zeros_like(ids)).astype(jnp.int32), wrong


def from_first(wrong: Array) -> Array:
    """Return bool [b, t], True from the first place of each row on where `wrong` [b, t] is."""
    return jnp.cumsum(wrong, axis=1, dtype=jnp.int32) > 0


def safe_places(
    places: Array | np.ndarray, lost: Array | None, tokens: int
) -> tuple[Array, Array | None]:
    """Return places [b, p] that are all below `tokens`, and where their logits can only be NaN.

    Args:
        places: integers [b, p].
        lost: bool [b, t], True at tokens whose logits can only be NaN; None = nowhere.
        tokens: t.

    Returns:
        places, and bool [b, p], or None = nowhere.

    Raises:
        ValueError: as `check_ids`.
    """
    known = check_ids("places", places, tokens)
    places, wrong = safe_ids(places, tokens)
    if lost is None:
        return places, None if known else wrong
    return places, wrong | jnp.take_along_axis(lost, places, axis=1)


def nan_where(wrong: Array | None, x: Array) -> Array:
    """Put NaN in the place of `x` [b, t, ...] where `wrong` [b, t] is; None = nowhere."""
    if wrong is None:
        return x
    wrong = wrong.reshape(wrong.shape + (1,) * (x.ndim - 2))
    return jnp.where(wrong, jnp.full_like(x, jnp.nan), x)


def _is_known(x: Array | np.ndarray | None) -> bool:
    """Whether this process may look at the values of an array, or of None."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable
