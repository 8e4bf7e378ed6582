"""What a measurement was made on and with."""

import os
import platform
from importlib.metadata import version


def machine() -> str:
    """Return versions, cores and device in one line."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    where = f"{cores} CPU cores ({platform.machine()})"
    if device.platform != "cpu":
        where += f", {device.device_kind}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax"))
    return f"Python {platform.python_version()}, {versions}; {where}"
