"""What a file of a stream's cache says about itself, and what its tensors must be."""

import json
from collections.abc import Mapping
from typing import Any

from mc_core.checks import fail
from mc_core.pretrained import Config, describe, read_description
from mc_core.weights import Leaf, check_leaves

KEY = "memory_caching_stream"  # of the metadata


def to_metadata(config: Config) -> dict[str, str]:
    """Return the metadata of a safetensors file that holds a cache."""
    return {KEY: json.dumps(describe(config))}


def check_stream(metadata: Mapping[str, str] | None, config: Config) -> None:
    """Hold a file's metadata to the configuration of the module that goes on with the stream.

    Raises:
        ValueError: the file holds no cache, or one of another module.
    """
    if KEY not in (metadata or {}):
        raise ValueError(f"has no {KEY!r} in its metadata: `save_cache` writes files that have it")
    saved = read_description(json.loads(dict(metadata or {})[KEY]), type(config)).to_dict()
    for name, value in config.to_dict().items():
        if saved[name] != value:
            fail(type(config).__name__, name, value, f"{saved[name]!r}, as in the cache's file")


def check_tensors(given: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> None:
    """Hold a file's tensors to those of a fresh cache for as many streams and tokens.

    Caches of whole sequences may have more slots; floats may have any precision.

    Raises:
        ValueError: lists all that is missing, unexpected, or of another shape or dtype.
    """
    check_leaves(
        given, {name: _like(leaf, name, given) for name, leaf in wanted.items()}, "tensors"
    )


def _like(wanted: Leaf, name: str, given: Mapping[str, Leaf]) -> Leaf:
    if name not in given:
        return wanted
    shape, dtype = wanted.shape, given[name].dtype
    length = f"{name.split('stored.')[0]}stored.length"
    if "stored." in name and length in given:
        shape = (shape[0], *given[length].shape[1:2], *shape[2:])
    return Leaf(shape, dtype if "float" in dtype and "float" in wanted.dtype else wanted.dtype)


def lies_far(name: str) -> bool:
    """Whether `cache_device="host"` keeps the tensor of this name in the host's memory."""
    return "stored.weights." in name or name.rpartition(".")[2] in ("keys", "values")


def batch_and_limit(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of streams, and the tokens that each has room for.

    Raises:
        ValueError: the tensors that say so are missing.
    """
    for block in ("", "0."):
        if f"{block}position" in tensors and f"{block}limit" in tensors:
            return len(tensors[f"{block}position"]), int(tensors[f"{block}limit"])
    raise ValueError("has no tensors 'position' and 'limit': must hold a cache")
