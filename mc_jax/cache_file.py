"""Caches in safetensors files, readable by both packages."""

from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.cache_file import (
    batch_and_capacity,
    check_stream,
    check_tensors,
    is_offloaded,
    to_field_names,
    to_file_names,
    to_metadata,
)
from mc_core.files import write_atomic
from mc_core.pretrained import Config
from mc_core.tree_utils import flatten, unflatten
from mc_core.weights import leaves
from mc_jax.numerics import Array
from mc_jax.offload import move_to_host


def save_cache(path: str | PathLike[str], cache: Any, config: Config) -> None:
    """Write a cache to a file, atomically.

    Args:
        path: path of the file.
        cache: cache of a layer, or of all blocks of a model.
        config: configuration of the layer or model.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {name: np.asarray(leaf) for name, leaf in flatten(cache)}
    write_atomic(Path(path), save(to_file_names(tensors), to_metadata(config)))


def load_cache(path: str | PathLike[str], module: Any, *, cache_device: str = "device") -> Any:
    """Read the cache of a stream from a file.

    Args:
        path: a file written by `save_cache` of either package.
        module: a layer or model with the same configuration as that of the saved cache.
        cache_device: storage of cached memories, `device` or `host`, as in `init_cache`.

    Raises:
        ValueError: the file is damaged or does not match; the message lists all mismatches.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            check_stream(file.metadata(), module.config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        size = batch_and_capacity(tensors)
        new = jax.eval_shape(lambda: module.init_cache(*size, cache_device=cache_device))
        fields = dict(flatten(new))
        check_tensors(leaves(tensors), leaves(to_file_names(fields)))
        for name, x in tensors.items():
            if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
                raise ValueError(f"{name} of {x.dtype}: needs jax.enable_x64(True)")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error

    def place(name: str, x: np.ndarray) -> Array:
        on_device = jnp.asarray(x)
        offloaded = cache_device == "host" and is_offloaded(name)
        return move_to_host(on_device) if offloaded else on_device

    tensors = to_field_names(tensors, fields)
    return unflatten(new, {name: place(name, x) for name, x in tensors.items()})
