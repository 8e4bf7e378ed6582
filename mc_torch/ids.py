"""Token ids and indices: a check where their values are known, a safe look-up where they are not.

A compiled program cannot raise. There an id out of range reads row 0, and the caller puts NaN in
the place of all that follows from it.
"""

import torch

from mc_core import checks
from mc_torch.numerics import Array


def check_ids(
    name: str, ids: Array, size: int, read: Array | None = None, values: bool = True
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
        True where the ids are known to be in range; False where only a compiled program, or a
        transform of `torch.func`, knows them.

    Raises:
        ValueError: no integers, or names the first id that is out of range, and its position.
    """
    checks.check_integers(name, str(ids.dtype).removeprefix("torch."))
    if not values or torch.compiler.is_compiling():
        return False
    if not ids.numel():
        return True
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    inside = ids.long() if read is None else torch.where(read, ids.long(), 0)
    try:
        low, high = torch.stack(torch.aminmax(inside)).tolist()
    except RuntimeError:  # batched by vmap, traced, or without values
        return False
    if low < 0 or high >= size:
        flags = None if read is None else read.cpu().numpy()
        checks.check_ids(name, ids.cpu().numpy(), size, flags)
    return True


def safe_ids(ids: Array, size: int, read: Array | None = None) -> tuple[Array, Array]:
    """Return ids that are all in range: 0 where one is not read or was out of range.

    Args:
        ids: integers [...] of any dtype and shape.
        size: number of ids.
        read: as `check_ids` takes it.

    Returns:
        ids, int64, and bool, True where one that is read was out of range.
    """
    ids = ids.long()
    inside = (ids >= 0) & (ids < size)
    kept, wrong = inside, ~inside
    if read is not None:
        kept, wrong = inside & read, wrong & read
    return torch.where(kept, ids, 0), wrong


def from_first(wrong: Array) -> Array:
    """Return bool [b, t], True from the first place of each row on where `wrong` [b, t] is."""
    return torch.cumsum(wrong, dim=1) > 0


def safe_places(places: Array, lost: Array | None, tokens: int) -> tuple[Array, Array | None]:
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
    return places, wrong | torch.take_along_dim(lost, places, dim=1)


def nan_where(wrong: Array | None, x: Array) -> Array:
    """Put NaN in the place of `x` [b, t, ...] where `wrong` [b, t] is; None = nowhere."""
    if wrong is None:
        return x
    wrong = wrong.reshape(wrong.shape + (1,) * (x.ndim - 2))
    return torch.where(wrong, torch.nan, x)
