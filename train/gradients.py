"""Loss and gradient of stacked microbatches, reduced once over the devices of the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, use_abstract_mesh

from mc_jax.sharding import RULES, num_shards
from mc_jax.width import gather_parts, scatter_sum, width_dim

Tree = Any
# (parameters, other state, microbatch) -> (sum of the losses, other state)
SumLosses = Callable[[Tree, Tree, Any], tuple[jax.Array, Tree]]
# (parameters, other state, stacked microbatches) -> (loss, gradient, other state)
Gradients = Callable[[Tree, Tree, Any], tuple[jax.Array, Tree, Tree]]


def make_gradients(
    sum_losses: SumLosses, weight_of: Callable[[Any], Any], shardings: Tree | None
) -> Gradients:
    """Return a function that averages loss and gradient over stacked microbatches.

    A microbatch's loss is its sum of losses divided by its weight. Each device sums the gradients
    of its own rows over the microbatches, in at least float32, and the devices reduce the sums
    once: by a reduce-scatter over those that share the parameters, and an all-reduce over
    those that hold the same ones. For this, with several microbatches, devices hold parameters
    whole along the width during the step. A single microbatch gathers each parameter where it is
    used.

    Args:
        sum_losses: the sum of a microbatch's losses, and the updated state.
        weight_of: the sum of the weights of a microbatch.
        shardings: of the parameters; None = one device.
    """

    def add(params: Tree, carry: Any, inputs: Any) -> tuple[Any, None]:
        total, gradient, rest = carry
        microbatch, weight = inputs

        def loss_of(params: Tree, rest: Tree) -> tuple[jax.Array, Tree]:
            loss, rest = sum_losses(params, rest, microbatch)
            return loss / weight, rest

        (loss, rest), new = jax.value_and_grad(loss_of, has_aux=True)(params, rest)
        return (total + loss, jax.tree.map(jnp.add, gradient, new), rest), None

    def accumulate(params: Tree, rest: Tree, batch: Any, weights: jax.Array) -> Any:
        first = (jnp.zeros(()), jax.tree.map(_zeros, params), rest)
        return jax.lax.scan(partial(add, params), first, (batch, weights))[0]

    def gradients(params: Tree, rest: Tree, batch: Any) -> tuple[jax.Array, Tree, Tree]:
        count = len(jax.tree.leaves(batch)[0])
        weights = jax.vmap(weight_of)(batch) * count
        if shardings is None:
            return accumulate(params, rest, batch, weights)
        mesh = jax.tree.leaves(shardings)[0].mesh
        summed = accumulate
        if num_shards(mesh, "batch") > 1:
            summed = _on_own_rows(accumulate, shardings, gathers=count > 1)
        with use_abstract_mesh(mesh.abstract_mesh):
            loss, gradient, rest = summed(params, rest, batch, weights)
        return loss, jax.lax.with_sharding_constraint(gradient, shardings), rest

    return gradients


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))


def _on_own_rows(
    accumulate: Callable[..., Any], shardings: Tree, *, gathers: bool
) -> Callable[..., Any]:
    """Call `accumulate` on each device's rows, and sum losses and gradients over the devices.

    Args:
        accumulate: maps parameters, other state, batch and weights to loss, gradient and state.
        shardings: of the parameters.
        gathers: gather all parameters before the call; otherwise, the model gathers those of which
            a device has a part (`gather_width`).
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape[axis] > 1)
    copies = tuple(axis for axis in axes if axis not in RULES["embed"])
    shares_width = copies != axes

    def dim_of(sharding: NamedSharding) -> int | None:
        return width_dim(sharding.spec) if shares_width else None

    def part(sharding: NamedSharding) -> PartitionSpec:
        dim = dim_of(sharding)
        return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, RULES["embed"])

    def gather(param: jax.Array, sharding: NamedSharding) -> jax.Array:
        return param if dim_of(sharding) is None else gather_parts(param, sharding.spec)

    def reduce(gradient: jax.Array, sharding: NamedSharding) -> jax.Array:
        if dim_of(sharding) is None:
            return jax.lax.psum(gradient, axes)
        if gathers:  # otherwise, this is the transpose of the model's gather
            gradient = scatter_sum(gradient, sharding.spec)
        return jax.lax.psum(gradient, copies) if copies else gradient

    def local(params: Tree, rest: Tree, batch: Any, weights: jax.Array) -> Any:
        whole = jax.tree.map(gather, params, shardings) if gathers else params
        loss, gradient, rest = accumulate(whole, rest, batch, weights)
        return jax.lax.psum(loss, axes), jax.tree.map(reduce, gradient, shardings), rest

    parts, whole, rows = jax.tree.map(part, shardings), PartitionSpec(), PartitionSpec(None, axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(parts, whole, rows, whole),
        out_specs=(whole, parts, whole),
        axis_names=set(axes),
        check_vma=False,
    )
