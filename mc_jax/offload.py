"""Arrays in host memory: reads copy results to the device, updates run on the host.

Only cached memories are offloaded (`init_cache(..., cache_device="host")`).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on as experimental

from mc_jax.numerics import Array

# Before jax 0.12, `compute_on` is another function.
compute_on: Any = getattr(experimental, "compute_on2", experimental.compute_on)
HOST = jax.memory.Space.Host
DEVICE = jax.memory.Space.Device
HOST_KIND = "pinned_host"  # JAX memory kind


def move_to_host(x: Array) -> Array:
    """Move an array [...] to host memory.

    Raises:
        ValueError: the array's device has no host memory.
    """
    if isinstance(x, jax.core.Tracer):
        return jax.device_put(x, HOST)
    device = next(iter(x.devices()))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_KIND not in kinds:
        raise ValueError(f"cache_device = 'host': {device} has {kinds}: must have {HOST_KIND!r}")
    return jax.device_put(x, x.sharding.with_memory_kind(HOST_KIND))


def read_from_host(function: Callable[..., Array], x: Array, *index: Array) -> Array:
    """Return `function(x, *index)`, a part of x [...], on the device."""
    if not on_host(x):
        return function(x, *index)
    return jax.device_put(_run(function, x, *index), DEVICE)


def update_in_place(function: Callable[..., Array], x: Array, *parts: Array) -> Array:
    """Return `function(x, *parts)`, an update of x [...], computed where x is stored."""
    return _run(function, x, *parts) if on_host(x) else function(x, *parts)


def on_host(x: Array) -> bool:
    """Return True if an array [...] is stored in host memory."""
    return jax.typeof(x).memory_space == HOST


def _run(function: Callable[..., Array], x: Array, *others: Any) -> Array:
    others = tuple(jax.device_put(other, HOST) for other in others)
    run = compute_on(function, compute_type="device_host", out_memory_spaces=HOST)
    return jax.jit(run)(x, *others)
