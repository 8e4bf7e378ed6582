"""Work split over local devices: by the rows of a batch, or by the heads of a layer.

A CPU can be several devices. XLA runs a batch of small matrix products, which is what a memory
consists of, on one core; with as many devices as cores, each device's share keeps a core busy.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mc_core.errors import UserError

AXIS = "batch"  # of the mesh


def request(count: int) -> None:
    """Have JAX see the CPU as `count` devices or more; without effect once JAX has started."""
    if count == 1 or jax.config.values["jax_num_cpu_devices"] >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return  # it has started: the devices are those that there are


def local(count: int, name: str, rows: int | None = None) -> list[jax.Device]:
    """Return the first `count` local devices of the default backend.

    Args:
        count: how many.
        name: what the user calls that number.
        rows: of the batch, if it is known here.

    Raises:
        UserError: there are fewer, or they do not divide the rows.
    """
    if rows is not None and rows % count:
        raise UserError(f"{name} = {count}: must be a divisor of the batch = {rows}")
    found = jax.local_devices()
    if count > len(found):
        kind = "CPU" if found[0].platform == "cpu" else found[0].device_kind
        raise UserError(
            f"{name} = {count}: must be <= {len(found)}, the number of {kind} devices that JAX sees"
        )
    return found[:count]


def replicate(tree: Any, devices: list[jax.Device]) -> Any:
    """Copy all arrays to every device; for one device they stay as they are."""
    if len(devices) == 1:
        return tree
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_rows(batch: Any, beside: Any, axis: int = 0) -> Any:
    """Split the rows of a batch over the devices that hold other arrays.

    Args:
        batch: arrays whose rows lie along `axis`; their number is a multiple of the devices'.
        beside: arrays out of `replicate`, or computed from them.
        axis: of the rows.

    Returns:
        the batch; as it was given where there is one device.
    """
    sharding = jax.tree.leaves(beside)[0].sharding
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return batch
    spec = PartitionSpec(*[None] * axis, AXIS)
    return jax.device_put(batch, NamedSharding(sharding.mesh, spec))


def split_heads(params: Any, devices: list[jax.Device]) -> Any:
    """Split a layer's projections by head over devices; XLA splits what follows from them.

    Args:
        params: of a layer, or of a model, as `nnx.split` gives them.
        devices: as many as divide the heads.
    """
    if len(devices) == 1:
        return params
    mesh = Mesh(np.array(devices), ("heads",), axis_types=(AxisType.Auto,))

    def place(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        inputs = "out_proj" in name or "down_proj" in name  # the others' outputs are by head
        axes = ("heads", None) if inputs else (None, "heads") if "_proj" in name else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(place, params)


def gather(tree: Any) -> Any:
    """Bring arrays out of `replicate` back to one device."""
    return tree if count(tree) == 1 else jax.device_put(tree, jax.local_devices()[0])


def count(tree: Any) -> int:
    """Return how many devices hold the arrays of a tree."""
    return len(jax.tree.leaves(tree)[0].devices())
