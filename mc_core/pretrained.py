"""What a file of weights says about itself; in a safetensors file it stands in the metadata.

The tensors of such a file have the names and the layout of PyTorch.
"""

import json
from collections.abc import Mapping
from typing import Any

from mc_core.checks import check_keys
from mc_core.config import AttentionConfig, MCConfig, ModelConfig
from mc_core.weights import Leaf

VERSION = 1  # of names, layouts and this description together
KEY = "memory_caching"  # of the metadata

Config = MCConfig | AttentionConfig | ModelConfig

_KINDS: dict[str, type[Config]] = {
    "MemoryCachingLayer": MCConfig,
    "AttentionLayer": AttentionConfig,
    "LanguageModel": ModelConfig,
}


def describe(config: Config) -> dict[str, Any]:
    """Return version, module and configuration as plain values."""
    module = next(name for name, kind in _KINDS.items() if isinstance(config, kind))
    return {"version": VERSION, "module": module, "config": config.to_dict()}


def read_description(description: Any, kind: Any) -> Any:
    """Return the configuration of a description.

    Args:
        description: of a file.
        kind: `MCConfig`, `AttentionConfig`, `ModelConfig`, or a union: what the file may hold.

    Raises:
        ValueError: another version or kind, or a configuration that is not valid.
    """
    keys = ("version", "module", "config")
    check_keys("description", description, keys, keys)
    version, module = description["version"], description["module"]
    if version != VERSION:
        raise ValueError(f"has version {version!r}: this package reads {VERSION}")
    if module not in _KINDS:
        raise ValueError(f"holds a {module!r}: must be one of {', '.join(_KINDS)}")
    config = _KINDS[module].from_dict(description["config"])
    if not isinstance(config, kind):
        raise ValueError(f"holds a {module}: load it with {module}.from_pretrained")
    return config


def to_metadata(config: Config) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    return {KEY: json.dumps(describe(config))}


def from_metadata(metadata: Mapping[str, str] | None, kind: Any) -> Any:
    """Return the configuration in a safetensors file's metadata; as `read_description`."""
    if KEY not in (metadata or {}):
        raise ValueError(f"has no {KEY!r} in its metadata: `mc convert` writes files that have it")
    return read_description(json.loads(dict(metadata or {})[KEY]), kind)


def one_dtype(leaves: Mapping[str, Leaf]) -> str:
    """Return the dtype of all parameters.

    Raises:
        ValueError: they have several.
    """
    found = sorted({leaf.dtype for leaf in leaves.values()})
    if len(found) != 1:
        raise ValueError(f"parameters have the dtypes {', '.join(found)}: must all have one")
    return found[0]
