"""File format of caches: metadata, tensor names and shapes."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from mc_core.checks import raise_config_error
from mc_core.pretrained import Config, describe, read_description
from mc_core.weights import ArraySpec, check_leaves

T = TypeVar("T")

KEY = "memory_caching_stream"  # key of the metadata entry

# Cache fields that have another name in files.
FILE_NAMES = {"capacity": "limit", "mask": "real"}


def to_metadata(config: Config) -> dict[str, str]:
    """Return the metadata of a cache file."""
    return {KEY: json.dumps(describe(config))}


def check_stream(metadata: Mapping[str, str] | None, config: Config) -> None:
    """Check that a file contains a cache with this configuration.

    Raises:
        ValueError: the file contains no cache, or a cache with another configuration.
    """
    if KEY not in (metadata or {}):
        raise ValueError(f"has no {KEY!r} in its metadata: must be a file written by `save_cache`")
    saved = read_description(json.loads(dict(metadata or {})[KEY]), type(config)).to_dict()
    for name, value in config.to_dict().items():
        if saved[name] != value:
            allowed = f"{saved[name]!r}, the value in the file"
            raise_config_error(type(config).__name__, name, value, allowed)


def to_file_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return tensors of a cache, by the names of its fields, under their names in files."""
    parts = {name: name.rpartition(".") for name in tensors}
    return {
        f"{parent}{dot}{FILE_NAMES.get(field, field)}": tensors[name]
        for name, (parent, dot, field) in parts.items()
    }


def to_field_names(tensors: Mapping[str, T], fields: Mapping[str, Any]) -> dict[str, T]:
    """Undo `to_file_names` for a cache with these fields."""
    names = to_file_names({name: name for name in fields})
    return {names[name]: tensor for name, tensor in tensors.items()}


def check_tensors(actual: Mapping[str, ArraySpec], expected: Mapping[str, ArraySpec]) -> None:
    """Check a file's tensors against those of a new cache with the same batch and capacity.

    A cache returned by a full pass may have more slots. Floating-point dtypes may differ.

    Args:
        actual: tensors of the file.
        expected: tensors of the new cache, by their names in files.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or dtype; the message lists
            all mismatches.
    """
    allowed = {name: _allow(leaf, name, actual) for name, leaf in expected.items()}
    check_leaves(actual, allowed, "tensors")


def _allow(expected: ArraySpec, name: str, actual: Mapping[str, ArraySpec]) -> ArraySpec:
    """Return the expected shape and dtype, with the file's number of slots and precision."""
    if name not in actual:
        return expected
    shape, dtype = expected.shape, actual[name].dtype
    length = f"{name.split('stored.')[0]}stored.length"
    if "stored." in name and length in actual:
        shape = (shape[0], *actual[length].shape[1:2], *shape[2:])
    return ArraySpec(
        shape, dtype if "float" in dtype and "float" in expected.dtype else expected.dtype
    )


def is_offloaded(name: str) -> bool:
    """Return True if `cache_device="host"` stores the tensor with this name in host memory."""
    return "stored.weights." in name or name.rpartition(".")[2] in ("keys", "values")


def batch_and_capacity(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Return the batch size and the capacity in tokens of a cache in a file.

    Raises:
        ValueError: the tensors that store these numbers are missing.
    """
    for block in ("", "0."):
        if f"{block}position" in tensors and f"{block}limit" in tensors:
            return len(tensors[f"{block}position"]), int(tensors[f"{block}limit"])
    raise ValueError("has no tensors 'position' and 'limit': must contain a cache")
