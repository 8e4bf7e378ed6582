"""Tensors in the host's memory: work on them where they lie, and bring what came of it.

Only cached memories may lie there (`init_cache(..., cache_device="host")`).
"""

from collections.abc import Callable

import torch

from mc_torch.numerics import Array


def move_to_host(x: Array) -> Array:
    """Move a tensor [...] to host memory, pinned where there is a GPU."""
    x = x.cpu()
    return x.pin_memory() if torch.cuda.is_available() else x


def take(function: Callable[..., Array], x: Array, *where: Array) -> Array:
    """Return `function(x, *where)`, a part of x [...], on the device of `where`."""
    return put(function, x, *where).to(where[0].device)


def put(function: Callable[..., Array], x: Array, *parts: Array) -> Array:
    """Return `function(x, *parts)`, an update of x [...], computed where x is stored."""
    return function(x, *(part.to(x.device) for part in parts))


def on_host(x: Array) -> bool:
    """Whether a tensor [...] is stored in host memory."""
    return x.device.type == "cpu"
