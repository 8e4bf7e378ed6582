"""Metadata of safetensors files of weights.

The tensors of such a file have PyTorch's names and layouts.
"""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

from mc_core.attention import AttentionConfig
from mc_core.checks import check_keys
from mc_core.config import LayerConfig, MCConfig, ModelConfig
from mc_core.log_linear import LogLinearConfig
from mc_core.weights import ArraySpec

VERSION = 1  # version of parameter names, layouts and the description
KEY = "memory_caching"  # key of the metadata entry
# Metadata key of a language model's tokenizer: `bytes`, or the SHA-256 of a tokenizer file.
TOKENIZER_KEY = "memory_caching_tokenizer"

Config = LayerConfig | ModelConfig

_KINDS: dict[str, type[Config]] = {
    "MemoryCachingLayer": MCConfig,
    "AttentionLayer": AttentionConfig,
    "LogLinearAttentionLayer": LogLinearConfig,
    "LanguageModel": ModelConfig,
}


def describe(config: Config) -> dict[str, Any]:
    """Return version, module and configuration as a dictionary."""
    module = next(name for name, kind in _KINDS.items() if isinstance(config, kind))
    return {"version": VERSION, "module": module, "config": config.to_dict()}


def read_description(description: Any, kind: Any) -> Any:
    """Return the configuration in a description.

    Args:
        description: from `describe`.
        kind: allowed class: that of a layer's configuration, `ModelConfig`, or a union of them.

    Raises:
        ValueError: the version or class does not match, or the configuration is invalid.
    """
    keys = ("version", "module", "config")
    check_keys("description", description, keys, keys)
    version, module = description["version"], description["module"]
    if version != VERSION:
        raise ValueError(f"has version {version!r}: must be {VERSION}")
    if module not in _KINDS:
        raise ValueError(f"contains a {module!r}: must be one of {', '.join(_KINDS)}")
    config = _KINDS[module].from_dict(description["config"])
    if not isinstance(config, kind):
        raise ValueError(f"contains a {module}: load it with {module}.from_pretrained")
    return config


def to_metadata(config: Config, tokenizer: str | None = None) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Args:
        config: configuration of the module.
        tokenizer: `bytes`, or the SHA-256 of a tokenizer file; None = unknown.
    """
    named = {} if tokenizer is None else {TOKENIZER_KEY: tokenizer}
    return {KEY: json.dumps(describe(config))} | named


def read_tokenizer(path: str | PathLike[str]) -> str | None:
    """Return the tokenizer of a safetensors file: `bytes`, a SHA-256, or None.

    Raises:
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get(TOKENIZER_KEY)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def from_metadata(metadata: Mapping[str, str] | None, kind: Any) -> Any:
    """Return the configuration in the metadata of a safetensors file; see `read_description`."""
    if KEY not in (metadata or {}):
        raise ValueError(f"has no {KEY!r} in its metadata: must be a file written by `mc convert`")
    return read_description(json.loads(dict(metadata or {})[KEY]), kind)


def one_dtype(leaves: Mapping[str, ArraySpec]) -> str:
    """Return the common dtype of all parameters.

    Raises:
        ValueError: the dtypes differ.
    """
    dtypes = sorted({leaf.dtype for leaf in leaves.values()})
    if len(dtypes) != 1:
        raise ValueError(
            f"parameters have the dtypes {', '.join(dtypes)}: must have the same dtype"
        )
    return dtypes[0]
