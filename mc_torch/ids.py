"""Range checks of token ids and indices, and safe lookups for compiled programs.

A compiled program cannot raise. Instead, an id out of range reads row 0, and the caller sets all
dependent outputs to NaN.
"""

import torch

from mc_core import checks
from mc_torch.numerics import Array


def check_ids(
    name: str, ids: Array, size: int, mask: Array | None = None, values: bool = True
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
        True where the ids are known to be in range; False where only a compiled program, or a
        transform of `torch.func`, knows them.

    Raises:
        ValueError: the ids are not integers, or one is out of range.
    """
    checks.check_integers(name, str(ids.dtype).removeprefix("torch."))
    if not values or torch.compiler.is_compiling():
        return False
    if not ids.numel():
        return True
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    inside = ids.long() if mask is None else torch.where(mask, ids.long(), 0)
    try:
        low, high = torch.stack(torch.aminmax(inside)).tolist()
    except RuntimeError:  # batched by vmap, traced, or without values
        return False
    if low < 0 or high >= size:
        flags = None if mask is None else mask.cpu().numpy()
        checks.check_ids(name, ids.cpu().numpy(), size, flags)
    return True


def safe_ids(ids: Array, size: int, mask: Array | None = None) -> tuple[Array, Array]:
    """Replace ids that are out of range or masked by 0.

    Args:
        ids: integers [...] of any dtype and shape.
        size: number of ids.
        mask: as in `check_ids`.

    Returns:
        ids, int64, and bool, True at unmasked ids that are out of range.
    """
    ids = ids.long()
    inside = (ids >= 0) & (ids < size)
    readable, out_of_range = inside, ~inside
    if mask is not None:
        readable, out_of_range = inside & mask, out_of_range & mask
    return torch.where(readable, ids, 0), out_of_range


def cumulative_any(mask: Array) -> Array:
    """Return the cumulative logical or of `mask` [b, t] along its rows: bool [b, t]."""
    return torch.cumsum(mask, dim=1) > 0


def safe_places(places: Array, invalid: Array | None, tokens: int) -> tuple[Array, Array | None]:
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
    return places, out_of_range | torch.take_along_dim(invalid, places, dim=1)


def nan_where(invalid: Array | None, x: Array) -> Array:
    """Set `x` [b, t, ...] to NaN where `invalid` [b, t] is True; None = no change."""
    if invalid is None:
        return x
    invalid = invalid.reshape(invalid.shape + (1,) * (x.ndim - 2))
    return torch.where(invalid, torch.nan, x)
