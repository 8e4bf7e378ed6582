"""What a safetensors file of weights says about itself; the tensors are in PyTorch's layout."""

import json
from collections.abc import Mapping
from typing import Any

from mc_core.config import MCConfig, ModelConfig
from mc_core.weights import Leaf

FORMAT = "memory-caching"
VERSION = "1"  # of the names, layouts and metadata together

_KINDS: dict[str, type[MCConfig] | type[ModelConfig]] = {
    "MemoryCachingLayer": MCConfig,
    "LanguageModel": ModelConfig,
}


def to_metadata(config: MCConfig | ModelConfig) -> dict[str, str]:
    """Return the metadata of a file that holds the weights of `config`'s module."""
    module = next(name for name, kind in _KINDS.items() if isinstance(config, kind))
    return {
        "format": FORMAT,
        "version": VERSION,
        "module": module,
        "config": json.dumps(config.to_dict()),
    }


def from_metadata(metadata: Mapping[str, str] | None, kind: Any) -> Any:
    """Return the configuration in a file's metadata.

    Args:
        metadata: of the file.
        kind: `MCConfig`, `ModelConfig`, or the union of both: what the file may hold.

    Raises:
        ValueError: the file is of another format, version or kind, or its configuration is not
            valid.
    """
    metadata = metadata or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its metadata has no format = {FORMAT!r}: write it with `mc convert`")
    if metadata.get("version") != VERSION:
        found = metadata.get("version")
        raise ValueError(f"version {found!r} of the format: this package reads {VERSION!r}")
    module = metadata.get("module", "")
    if module not in _KINDS:
        raise ValueError(f"holds a {module!r}: must be one of {', '.join(_KINDS)}")
    config = _KINDS[module].from_dict(json.loads(metadata.get("config", "null")))
    if not isinstance(config, kind):
        raise ValueError(f"holds a {module}: load it with {module}.from_pretrained")
    return config


def one_dtype(leaves: Mapping[str, Leaf]) -> str:
    """Return the dtype of all parameters.

    Raises:
        ValueError: they have several.
    """
    found = sorted({leaf.dtype for leaf in leaves.values()})
    if len(found) != 1:
        raise ValueError(f"parameters of dtypes {', '.join(found)}: must all have one")
    return found[0]
