"""Meshes of devices, and the one table that says how parameters and batches are sharded over them.

A mesh has four axes: `data` and `fsdp` share the rows of a batch, `fsdp` also shards every
parameter along the model's width, `heads` shards heads and the hidden layer of the feed-forward
block, and `context` shards the tokens of a sequence. XLA inserts the communication.

perf(cpu): XLA:CPU runs a batch of small matrix products on one core. With one device per core, all
cores are used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mc_core.errors import UserError

Method = TypeVar("Method", bound=Callable[..., Any])

FREE = "free"
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


def shard_model(model: nnx.Module, mesh: Mesh | None) -> None:
    """Move the parameters of a model onto a mesh, in place; None = leave them."""
    if mesh is not None:
        shardings = parameter_shardings(model, mesh)
        nnx.update(model, jax.device_put(nnx.state(model), shardings))


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


def automatic_axes() -> dict[str, int]:
    """Return the sizes > 1 of the axes of `jax.set_mesh` over which XLA shards arrays."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = [name for name, kind in kinds if kind == AxisType.Auto and name in AXES]
    return {name: mesh.shape[name] for name in auto if mesh.shape[name] > 1}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard an array [...] inside a compiled program, over the mesh of `jax.set_mesh`.

    Without a mesh, or for mesh axes of another type than Auto, there is no constraint.

    Args:
        x: the array.
        axes: for each leading dimension, a key of `RULES`, None = not sharded, or `FREE` = chosen
            by XLA. A dimension that the mesh does not divide is not sharded.
    """
    sizes = automatic_axes()
    if not sizes:
        return x

    def rule(axis: str | None, size: int) -> Any:
        if axis is FREE:
            return PartitionSpec.UNCONSTRAINED
        names = tuple(name for name in (RULES[axis] if axis else ()) if name in sizes)
        return names if size % math.prod(sizes[name] for name in names) == 0 else None

    spec = PartitionSpec(*map(rule, axes, x.shape))
    return jax.lax.with_sharding_constraint(x, spec)


def with_auto_axes(method: Method) -> Method:
    """Let a method of a module run under a mesh of Explicit axes, the default of `jax.make_mesh`.

    Inside, all axes are Auto. Of the results, arrays with the rows of the first argument are
    sharded over them, and those that also have its tokens over these, like the first argument.

    Args:
        method: maps arrays [b, t, ...] and other arguments to a tree of arrays.
    """

    @wraps(method)
    def call(self: nnx.Module, x: Any, *args: Any, **options: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit not in mesh.axis_types:
            return method(self, x, *args, **options)
        x = jnp.asarray(x)
        graphdef, state = nnx.split(self)
        leaves, tree = jax.tree.flatten((args, options))
        is_array = [hasattr(leaf, "dtype") for leaf in leaves]

        def inside(state: Any, x: jax.Array, arrays: list[Any]) -> Any:
            given = iter(arrays)
            filled = [
                next(given) if found else leaf for found, leaf in zip(is_array, leaves, strict=True)
            ]
            args, options = jax.tree.unflatten(tree, filled)
            return method(nnx.merge(graphdef, state), x, *args, **options)

        def spec(result: jax.ShapeDtypeStruct) -> PartitionSpec:
            same = [a == b for a, b in zip(result.shape, x.shape[:2], strict=False)]
            shared = same.index(False) if False in same else len(same)
            return PartitionSpec(*jax.typeof(x).sharding.spec[:shared])

        arrays = [leaf for found, leaf in zip(is_array, leaves, strict=True) if found]
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), (state, x, arrays)
        )
        auto = dict.fromkeys(mesh.axis_names, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(auto)):
            results = jax.eval_shape(inside, *shapes)
        specs = jax.tree.map(spec, results)
        return jax.sharding.auto_axes(inside, out_sharding=specs)(state, x, arrays)

    return call  # type: ignore[return-value]


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


def split_rows(batch: Any, like: Any, axis: int = 0) -> Any:
    """Shard the rows of a batch over the mesh of a model's parameters.

    Args:
        batch: arrays with rows along `axis`.
        like: parameters, placed by `parameter_shardings` or not.
        axis: axis of the rows.

    Returns:
        the batch on the mesh, replicated where an array has no rows or the mesh does not divide
        them; without a mesh, the batch unchanged.
    """
    mesh = mesh_of(like)
    if mesh is None:
        return batch
    parts = num_shards(mesh, "batch")

    def place(x: Any) -> jax.Array:
        rows = "batch" if x.ndim > axis and x.shape[axis] % parts == 0 else None
        axes = [None] * min(axis, x.ndim) + [rows] * (x.ndim > axis)
        return jax.device_put(x, axes_sharding(mesh, *axes))

    return jax.tree.map(place, batch)


def use_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """Return a context in which programs are compiled for the mesh of the arrays of a tree."""
    mesh = mesh_of(tree)
    return nullcontext() if mesh is None or mesh.size == 1 else jax.set_mesh(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh of the arrays of a tree; None if they are not placed on a mesh."""
    mesh = getattr(jax.tree.leaves(tree)[0].sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None
