"""Configurations in checkpoints, also of older versions."""

from pathlib import Path
from typing import Any

from mc_core.errors import UserError
from train.config import TextConfig, TrainConfig, from_dict


def config_of(directory: Path, config: Any) -> TrainConfig:
    """Return the configuration in a checkpoint's metadata.

    Args:
        directory: run directory, for the error message.
        config: its plain values.

    Raises:
        UserError: another version wrote it.
    """
    try:
        return from_dict(_with_old_defaults(config))
    except ValueError as error:
        raise other_version(directory, error) from error


def _with_old_defaults(config: Any) -> Any:
    """Return a checkpoint's configuration with the former behavior of keys that have changed."""
    if isinstance(config, dict) and "devices" in config.get("run", {}):
        run = dict(config["run"])
        config = config | {"run": run | {"mesh": {"data": run.pop("devices")}}}
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or data.get("task", TextConfig.task) != TextConfig.task:
        return config
    # Documents were concatenated without a separator.
    return config | {"data": {"separator": ""} | data}


def other_version(directory: Path, error: Exception) -> UserError:
    """Return the error of a checkpoint that this version cannot read."""
    return UserError(
        f"{directory} has a checkpoint of another version ({error}); "
        "use the version that wrote it, or another run.directory"
    )
