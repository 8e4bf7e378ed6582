"""The devices of a run, and the sharding of its training state."""

from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from mc_core.errors import UserError
from mc_jax.sharding import axes_sharding, local, make_mesh, num_shards, parameter_shardings
from train.config import MeshConfig, TrainConfig


def open_mesh(config: MeshConfig, name: str = "run.mesh") -> Mesh:
    """Return the mesh of all devices; on the CPU of a single process, of the first devices.

    Args:
        config: sizes of the axes.
        name: name of the option, for error messages.

    Raises:
        UserError: the product of the sizes is not the number of devices.
    """
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return make_mesh(*config.sizes.values(), name=name)
    devices = local(config.cpu_devices, name)
    return make_mesh(*config.cpu_sizes.values(), devices=devices, name=name)


def check_batch(config: TrainConfig, mesh: Mesh) -> None:
    """Check that the mesh divides the microbatch.

    Raises:
        UserError: it does not.
    """
    parts, rows = num_shards(mesh, "batch"), config.run.batch_size
    if rows % parts:
        raise UserError(
            f"run.mesh: data * fsdp = {parts}: must be a divisor of run.batch_size = {rows}"
        )


def state_shardings(
    model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Any, Any, Any]:
    """Return the shardings of parameters, optimizer state and other state of an abstract model.

    Moments are sharded like their parameters; counts and random streams are replicated.
    """
    shardings = parameter_shardings(model, mesh)
    params, rest = (nnx.to_pure_dict(x) for x in nnx.split_state(shardings, nnx.Param, ...))
    abstract = jax.eval_shape(optimizer.init, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract,
        params,
        transform_non_params=lambda _: axes_sharding(mesh),
    )
    return params, moments, rest
