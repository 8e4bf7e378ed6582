"""Meshes of devices, and the one table that says how parameters and batches are sharded over them.

A mesh has four axes: `data` and `fsdp` share the rows of a batch, `fsdp` also shards every
parameter along the model's width, `heads` shards heads and the hidden layer of the feed-forward
block, and `context` shards the tokens of a sequence. XLA inserts the communication.

perf(cpu): XLA:CPU runs a batch of small matrix products on one core. With one device per core, all
cores are used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mc_core.errors import UserError

AXES = ("data", "fsdp", "heads", "context")

# Mesh axes by the name of an array's axis. Parameters carry these names as the metadata `axes`,
# one per dimension; None = not sharded.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "embed": ("fsdp",),
    "heads": ("heads",),
    "ffn": ("heads",),
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    heads: int = 1,
    context: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
    name: str = "mesh",
) -> Mesh:
    """Return a mesh with the axes of `AXES`, of type Auto: XLA propagates the sharding.

    Args:
        data: devices that share a batch and hold the same parameters; -1 = all that are left.
        fsdp: devices that share a batch and the parameters (fully sharded data parallelism); or -1.
        heads: devices that share the heads; or -1.
        context: devices that share the tokens of a sequence; or -1.
        devices: the devices; None = all, of all processes.
        name: name of the option, for error messages.

    Raises:
        UserError: a size is not positive, two are -1, or the product is not the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, heads, context), strict=True))
    devices = jax.devices() if devices is None else list(devices)
    sizes = fill_sizes(sizes, len(devices), name)
    shape = tuple(sizes.values())
    if math.prod(shape) != len(devices):
        kind = "CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        raise UserError(
            f"{name} = {describe(sizes)}: must have a product of {len(devices)}, the number of "
            f"{kind} devices that JAX sees; got {math.prod(shape)}"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def fill_sizes(sizes: Mapping[str, int], count: int, name: str = "mesh") -> dict[str, int]:
    """Replace the size -1, if any, so that the product of the sizes is `count` where possible.

    Raises:
        UserError: a size is 0 or below -1, two are -1, or the others do not divide `count`.
    """
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"{name}.{axis} = {size}: must be >= 1, or -1 for what is left")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if not open_axes:
        return dict(sizes)
    if len(open_axes) > 1:
        raise UserError(f"{name} = {describe(sizes)}: must have -1 on at most one axis")
    known = math.prod(size for size in sizes.values() if size != -1)
    if count % known:
        raise UserError(
            f"{name} = {describe(sizes)}: the product of the sizes without -1, {known}, must be a "
            f"divisor of {count}, the number of devices"
        )
    return dict(sizes) | {open_axes[0]: count // known}


def describe(sizes: Mapping[str, int]) -> str:
    """Return `data=4,heads=2`, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "data=1"


def axes_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Return the sharding of an array with the named axes, by `RULES`.

    Mesh axes that the mesh lacks are ignored, so that it may be any mesh that has some of `AXES`.

    Args:
        mesh: the mesh.
        axes: a key of `RULES` or None for each leading dimension.
    """

    def rule(axis: str | None) -> tuple[str, ...] | None:
        present = [name for name in RULES[axis] if name in mesh.shape] if axis else []
        return tuple(present) or None

    return NamedSharding(mesh, PartitionSpec(*map(rule, axes)))


def num_shards(mesh: Mesh, axis: str | None) -> int:
    """Return the number of parts into which a mesh divides an axis of `RULES`; 1 for None."""
    return math.prod(mesh.shape.get(name, 1) for name in (RULES[axis] if axis else ()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of token ids [b, t]: rows over data and fsdp, tokens over context."""
    return axes_sharding(mesh, "batch", "tokens")


def parameter_shardings(model: nnx.Module | nnx.State, mesh: Mesh) -> nnx.State:
    """Return the sharding of each parameter of a model or layer, as a tree like `nnx.state(model)`.

    Use it to create a model sharded, or to move one:

        abstract = nnx.eval_shape(create)
        state = jax.jit(lambda: nnx.state(create()), out_shardings=shardings)()
        state = jax.device_put(nnx.state(model), shardings)

    Args:
        model: a model, a layer, or the state of one; arrays or, from `nnx.eval_shape`, shapes.
            Variables without the metadata `axes` are replicated; dimensions before the named ones,
            such as that of stacked layers, are not sharded.
        mesh: the mesh.

    Raises:
        UserError: the mesh does not divide the heads of a layer, or the dimension of a parameter.
    """
    if isinstance(model, nnx.Module):
        _check_heads(model, mesh)
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    flat = nnx.to_flat_state(state)
    shardings = [
        (path, variable.replace(_variable_sharding(path, variable, mesh)))
        for path, variable in zip(flat.paths, flat.leaves, strict=True)
    ]
    return nnx.from_flat_state(shardings)


def _variable_sharding(path: Sequence[Any], variable: Any, mesh: Mesh) -> NamedSharding:
    axes = variable.get_metadata().get("axes", ())
    shape = variable.shape
    sharding = axes_sharding(mesh, *[None] * (len(shape) - len(axes)), *axes)
    for size, axis in zip(shape[len(shape) - len(axes) :], axes, strict=True):
        parts = num_shards(mesh, axis)
        if size % parts:
            raise UserError(
                f"mesh {'*'.join(RULES[axis])} = {parts}: must be a divisor of {size}, the size of "
                f"the axis {axis!r} of {'.'.join(map(str, path))}"
            )
    return sharding


def _check_heads(model: nnx.Module, mesh: Mesh) -> None:
    parts = num_shards(mesh, "heads")
    for _, module in nnx.iter_modules(model):
        config = getattr(module, "config", None)
        for name in ("num_heads", "kv_heads"):
            count = getattr(config, name, parts)
            if count % parts:
                raise UserError(f"mesh heads = {parts}: must be a divisor of {name} = {count}")


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
