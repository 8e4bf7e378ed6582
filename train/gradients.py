"""Loss and gradient of stacked microbatches, reduced once over the devices of the batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec, use_abstract_mesh

from mc_jax.sharding import RULES, num_shards

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
    once. For this, with several microbatches, devices hold parameters whole along the
    width during the step. A single microbatch gathers each parameter where it is used.

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
        if len(weights) == 1:
            return add(params, first, jax.tree.map(lambda x: x[0], (batch, weights)))[0]
        return jax.lax.scan(partial(add, params), first, (batch, weights))[0]

    splits_width = shardings is not None and num_shards(_mesh(shardings), "embed") > 1

    def gradients(params: Tree, rest: Tree, batch: Any) -> tuple[jax.Array, Tree, Tree]:
        count = len(jax.tree.leaves(batch)[0])
        weights = jax.vmap(weight_of)(batch) * count
        if shardings is None:
            return accumulate(params, rest, batch, weights)
        summed = (
            _on_own_rows(accumulate, shardings) if count > 1 or not splits_width else accumulate
        )
        with use_abstract_mesh(_mesh(shardings).abstract_mesh):
            loss, gradient, rest = summed(params, rest, batch, weights)
        return loss, jax.lax.with_sharding_constraint(gradient, shardings), rest

    return gradients


def _zeros(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))


def _mesh(shardings: Tree) -> Mesh:
    return jax.tree.leaves(shardings)[0].mesh


def _on_own_rows(accumulate: Callable[..., Any], shardings: Tree) -> Callable[..., Any]:
    """Call `accumulate` on each device's rows, and sum losses and gradients over the devices."""
    mesh = _mesh(shardings)
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape[axis] > 1)
    if num_shards(mesh, "batch") == 1:
        return accumulate

    def local(params: Tree, rest: Tree, batch: Any, weights: jax.Array) -> Any:
        loss, gradient, rest = accumulate(params, rest, batch, weights)
        return *jax.lax.psum((loss, gradient), axes), rest

    whole, rows = PartitionSpec(), PartitionSpec(None, axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(whole, whole, rows, whole),
        out_specs=whole,
        axis_names=set(axes),
        check_vma=False,
    )
