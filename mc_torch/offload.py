"""Tensors in host memory: reads copy results to the device, updates run on the host.

Only cached memories are offloaded (`init_cache(..., cache_device="host")`).
"""

from collections.abc import Callable

import torch

from mc_torch.numerics import Array


def move_to_host(x: Array) -> Array:
    """Move a tensor [...] to host memory, pinned if there is a GPU."""
    x = x.cpu()
    return x.pin_memory() if torch.cuda.is_available() else x


def read_from_host(function: Callable[..., Array], x: Array, *index: Array) -> Array:
    """Return `function(x, *index)`, a part of x [...], on the device of `index`."""
    return update_in_place(function, x, *index).to(index[0].device)


def update_in_place(function: Callable[..., Array], x: Array, *parts: Array) -> Array:
    """Return `function(x, *parts)`, an update of x [...], computed where x is stored."""
    return function(x, *(part.to(x.device) for part in parts))


def on_host(x: Array) -> bool:
    """Return True if a tensor [...] is stored in host memory."""
    return x.device.type == "cpu"
