"""Parameters with named axes, sharded along the model's width over the mesh axis `fsdp`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mc_jax.sharding import RULES, automatic_axes, constrain


def sharded_param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """Return a parameter [...] with named axes, for `parameter_shardings` and `gather_width`.

    Args:
        value: the parameter, whole.
        axes: a key of `RULES` or None for each dimension.
    """
    return nnx.Param(value, **axes_metadata(value.shape, *axes))


def axes_metadata(shape: Sequence[int], *axes: str | None) -> dict[str, Any]:
    """Return the metadata of a parameter of this shape with named axes."""
    width = {"width": shape[axes.index("embed")]} if "embed" in axes else {}
    return {"axes": axes} | width


def gather_width(param: nnx.Variable) -> jax.Array:
    """Return the value [...] of a parameter, whole along the model's width.

    Otherwise XLA may shard the activations along the width, and communicate them at each product.

    In a `jax.shard_map` over `fsdp`, the value may be the part of the device. It is then gathered,
    and its gradient is summed over the devices and scattered.
    """
    metadata, value = param.get_metadata(), param[...]
    axes = metadata.get("axes", ())
    if "embed" in axes:
        dim = value.ndim - len(axes) + axes.index("embed")
        if value.shape[dim] != metadata.get("width", value.shape[dim]):
            rules = [RULES[axis] if axis else None for axis in axes]
            return gather_parts(value, PartitionSpec(*[None] * (value.ndim - len(axes)), *rules))
    return constrain(value, *[None if axis == "embed" else axis for axis in axes])


def gather_widths(state: nnx.State) -> nnx.State:
    """Return the state of a module with all parameters whole along the width."""
    return jax.tree.map(
        lambda x: x.replace(gather_width(x)), state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def width_dim(spec: PartitionSpec) -> int | None:
    """Return the dimension that a specification shards along the model's width, or None."""
    return next((dim for dim, names in enumerate(_names(spec)) if names & {*RULES["embed"]}), None)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_parts(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Gather an array [...] from the parts of the devices, in a `jax.shard_map` over `fsdp`.

    Its gradient is summed over the devices in at least float32, and scattered.

    Args:
        part: the device's part of an array along the width.
        spec: of the array outside of the `shard_map`; it shards the width.
    """
    gather = partial(jax.lax.all_gather, axis_name=RULES["embed"], axis=width_dim(spec), tiled=True)
    return _on_each_device(gather, part, spec)


def _gather_forward(part: jax.Array, spec: PartitionSpec) -> tuple[jax.Array, None]:
    return gather_parts(part, spec), None


def _gather_backward(spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    dtype = gradient.dtype
    wide = gradient.astype(jnp.promote_types(dtype, jnp.float32))
    return (scatter_sum(wide, spec).astype(dtype),)


gather_parts.defvjp(_gather_forward, _gather_backward)


def scatter_sum(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return the device's part of the sum over the devices of x [...].

    It is the transpose of `gather_parts`; `spec` is that of the sum.
    """
    dim, axes = width_dim(spec), RULES["embed"]
    scatter = partial(jax.lax.psum_scatter, axis_name=axes, scatter_dimension=dim, tiled=True)
    return _on_each_device(scatter, x, spec)


def _on_each_device(
    collective: Callable[[jax.Array], jax.Array], x: jax.Array, spec: PartitionSpec
) -> jax.Array:
    """Call a collective on shards over the axes of type Auto, which XLA would gather for it."""
    shared = [names & automatic_axes().keys() for names in _names(spec)]
    axes = set().union(*shared)
    if not axes:
        return collective(x)
    shards = PartitionSpec(*map(tuple, shared))
    return jax.shard_map(
        collective, in_specs=(shards,), out_specs=shards, axis_names=axes, check_vma=False
    )(x)


def _names(spec: PartitionSpec) -> list[set[str]]:
    """Return the mesh axes of each dimension."""
    parts = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    return [{name for name in names if name is not None} for names in parts]
