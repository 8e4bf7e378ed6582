"""YAML files of runs, their `base` files, and merging."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mc_core.errors import UserError


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML mapping from a file.

    Raises:
        UserError: the file cannot be read, or is not a mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}: give a YAML file") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: must be a mapping of keys")
    return loaded


def read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """Read a YAML file merged over its `base`, a path relative to the file's folder.

    Args:
        path: the file.
        above: the chain of files of which this file is the base.

    Raises:
        UserError: a file cannot be read, or the bases form a cycle.
    """
    if path.resolve() in above:
        raise UserError(f"{path}: base: cyclic reference to this file")
    loaded = read_yaml(path)
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {base!r}: must be the name of a YAML file")
    return merge(read_with_bases(path.parent / base, (*above, path.resolve())), loaded, path)


def merge(low: DictConfig, high: DictConfig, name: Path | str) -> DictConfig:
    """Merge `high` into `low`; a different memory kind or task replaces the whole section.

    Both arguments may be modified.

    Raises:
        UserError: the structures differ; the message starts with `name`, the source of `high`.
    """
    kinds = [_select(config, "model.layer.memory.kind") for config in (low, high)]
    if None not in kinds and kinds[0] != kinds[1]:
        low = low.copy()
        del low["model"]["layer"]["memory"]
    task = _select(high, "data.task")
    if task not in (None, _select(low, "data.task", "text")) and "data" in low:
        low = low.copy()
        del low["data"]
    try:
        merged = OmegaConf.unsafe_merge(low, high)
    except TypeError as error:
        raise UserError(f"{name}: has a list in place of a mapping of keys") from error
    assert isinstance(merged, DictConfig)
    return merged


def to_plain(config: DictConfig, path: Path) -> dict[str, Any]:
    """Return plain values with resolved `${...}` references.

    Raises:
        UserError: a reference of the file `path` cannot be resolved.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def _select(config: DictConfig, key: str, default: str | None = None) -> Any:
    """Return the value at a dotted key, or the default."""
    try:
        return OmegaConf.select(config, key, default=default)
    except OmegaConfBaseException:
        return default


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return " ".join(str(error).split("\n")[0].split())
