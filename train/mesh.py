"""The devices of a run, and the sharding of its training state."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mc_core.errors import UserError
from mc_jax.sharding import axes_sharding, local, make_mesh, num_shards, parameter_shardings
from train.config import MeshConfig, TrainConfig

Tree = Any
Path = tuple[Any, ...]  # keys of a leaf of a tree


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


def state_shardings(model: nnx.Module, state: Tree, mesh: Mesh) -> Any:
    """Return the shardings of a training state, a named tuple with `params` and `rest`.

    Arrays of the other fields that belong to a parameter, such as its moments, are sharded like it:
    they have its shape, and their paths end with its path. All others are replicated.

    Args:
        model: abstract model.
        state: abstract training state of the model.
        mesh: the devices.

    Raises:
        UserError: the mesh does not divide a parameter.
    """
    shardings = parameter_shardings(model, mesh)
    params, rest = (nnx.to_pure_dict(x) for x in nnx.split_state(shardings, nnx.Param, ...))
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
    }

    def of_leaf(path: Path, leaf: Any) -> Any:
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return axes_sharding(mesh)

    others = jax.tree_util.tree_map_with_path(of_leaf, state._replace(params=None, rest=None))
    return others._replace(params=params, rest=rest)


def _names(path: Path) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
