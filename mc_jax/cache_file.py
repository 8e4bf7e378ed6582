"""A stream's cache in a safetensors file, which either package may go on with."""

from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.files import write_atomic
from mc_core.pretrained import Config
from mc_core.streams import batch_and_limit, check_stream, check_tensors, lies_far, to_metadata
from mc_core.trees import flatten, unflatten
from mc_core.weights import leaves
from mc_jax.host import move_to_host
from mc_jax.numerics import Array


def save_cache(path: str | PathLike[str], cache: Any, config: Config) -> None:
    """Write a cache; the file appears whole or not at all.

    Args:
        path: the file.
        cache: of a layer, or of all blocks of a model.
        config: of the layer or model.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {name: np.asarray(leaf) for name, leaf in flatten(cache)}
    write_atomic(Path(path), save(tensors, to_metadata(config)))


def load_cache(path: str | PathLike[str], module: Any, *, cache_device: str = "device") -> Any:
    """Read a cache that goes on with a module.

    Args:
        path: a file that `save_cache` of either package wrote.
        module: a layer or model of the configuration that the stream began with.
        cache_device: `device`, or `host`, where cached memories then lie; as in `init_cache`.

    Raises:
        ValueError: the file is damaged, or holds something else: lists all that is wrong.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            check_stream(file.metadata(), module.config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        size = batch_and_limit(tensors)
        fresh = jax.eval_shape(lambda: module.init_cache(*size, cache_device=cache_device))
        check_tensors(leaves(tensors), leaves(dict(flatten(fresh))))
        for name, x in tensors.items():
            if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
                raise ValueError(f"{name} of {x.dtype}: needs jax.enable_x64(True)")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error

    def put(name: str, x: np.ndarray) -> Array:
        on_device = jnp.asarray(x)
        return move_to_host(on_device) if cache_device == "host" and lies_far(name) else on_device

    return unflatten(fresh, {name: put(name, x) for name, x in tensors.items()})
