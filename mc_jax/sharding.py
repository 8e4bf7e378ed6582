"""Data parallelism over rows of a batch, and tensor parallelism over heads, on local devices.

perf(cpu): XLA:CPU runs a batch of small matrix products on one core. With one device per core, all
cores are used.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mc_core.errors import UserError

AXIS = "batch"  # name of the mesh axis


def request(count: int) -> None:
    """Split the CPU into at least `count` JAX devices; without effect once JAX is initialized."""
    if count == 1 or jax.config.values["jax_num_cpu_devices"] >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # JAX is initialized: the number of devices is fixed


def local(count: int, name: str, rows: int | None = None) -> list[jax.Device]:
    """Return the first `count` local devices of the default backend.

    Args:
        count: number of devices.
        name: name of the option, for error messages.
        rows: number of rows of the batch, if known.

    Raises:
        UserError: there are fewer devices, or their number does not divide the rows.
    """
    if rows is not None and rows % count:
        raise UserError(f"{name} = {count}: must be a divisor of the batch = {rows}")
    devices = jax.local_devices()
    if count > len(devices):
        kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        raise UserError(
            f"{name} = {count}: must be <= {len(devices)}, "
            f"the number of {kind} devices that JAX sees"
        )
    return devices[:count]


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Replicate arrays on all devices; with one device they are returned unchanged."""
    if len(devices) == 1:
        return tree
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_rows(batch: Any, like: Any, axis: int = 0) -> Any:
    """Shard the rows of a batch over the devices of other arrays.

    Args:
        batch: arrays with rows along `axis`; their number is a multiple of the number of devices.
        like: replicated arrays, from `replicate` or computed from them.
        axis: axis of the rows.

    Returns:
        the sharded batch; with one device, the batch unchanged.
    """
    sharding = jax.tree.leaves(like)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return batch
    spec = PartitionSpec(*[None] * axis, AXIS)
    return jax.device_put(batch, NamedSharding(sharding.mesh, spec))


def shard_heads(params: Any, devices: list[jax.Device]) -> Any:
    """Shard the projections of layers by head; XLA propagates the sharding.

    Args:
        params: parameters of a layer or a model, from `nnx.split`.
        devices: devices, whose number divides the number of heads.
    """
    if len(devices) == 1:
        return params
    mesh = Mesh(np.array(devices), ("heads",), axis_types=(AxisType.Auto,))

    def place(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        inputs = "out_proj" in name or "down_proj" in name  # sharded on the input axis
        axes = ("heads", None) if inputs else (None, "heads") if "_proj" in name else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(place, params)


def gather(tree: Any) -> Any:
    """Move replicated arrays to one device."""
    return tree if count(tree) == 1 else jax.device_put(tree, jax.local_devices()[0])


def count(tree: Any) -> int:
    """Return the number of devices that hold the arrays of a tree."""
    return len(jax.tree.leaves(tree)[0].devices())
