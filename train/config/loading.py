"""Configurations of runs from YAML files and `key=value` overrides."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mc_core.errors import UserError
from train.config.schema import TrainConfig, from_dict
from train.config.yaml_files import first_line, merge, read_with_bases, to_plain

TAG = re.compile(r"model\.layer\.memory\.kind=|data\.task=")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Load a YAML file over its `base` files, and apply `key=value` overrides.

    The path in `base` is relative to the folder of the file.

    Raises:
        UserError: a file cannot be read, or a key or value is not allowed.
    """
    defaults = OmegaConf.create({"run": {"directory": f"runs/{path.stem}"}})
    merged = merge(defaults, read_with_bases(path), path)
    merged = apply_overrides(merged, overrides)
    try:
        return from_dict(to_plain(merged, path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def apply_overrides(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Merge `key=value` overrides into a configuration, which may be modified.

    Raises:
        UserError: an override is not valid; the message starts with it.
    """
    # Apply overrides that select a memory or task before those of its other keys.
    for word in sorted(overrides, key=lambda word: not TAG.match(word)):
        if "=" not in word:
            raise UserError(f"{word}: must have the form key=value")
        try:
            config = merge(config, OmegaConf.from_dotlist([word]), word)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{word}: {first_line(error)}") from error
    return config
