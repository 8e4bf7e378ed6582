"""Caches in safetensors files, readable by both packages."""

from os import PathLike
from pathlib import Path
from typing import Any

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
from mc_torch.numerics import Array
from mc_torch.offload import move_to_host


def save_cache(path: str | PathLike[str], cache: Any, config: Config) -> None:
    """Write a cache to a file, atomically.

    Args:
        path: path of the file.
        cache: cache of a layer, or of all blocks of a model.
        config: configuration of the layer or model.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    # safetensors refuses tensors that share memory.
    tensors = {name: leaf.detach().cpu().clone() for name, leaf in flatten(cache)}
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
        with safe_open(path, framework="pt") as file:
            check_stream(file.metadata(), module.config)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        new = module.init_cache(*batch_and_capacity(tensors), cache_device=cache_device)
        fields = dict(flatten(new))
        check_tensors(leaves(tensors), leaves(to_file_names(fields)))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    device = next(module.parameters()).device

    def place(name: str, x: Array) -> Array:
        offloaded = cache_device == "host" and is_offloaded(name)
        return move_to_host(x) if offloaded else x.to(device)

    tensors = to_field_names(tensors, fields)
    return unflatten(new, {name: place(name, x) for name, x in tensors.items()})
