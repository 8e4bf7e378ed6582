"""Command-line options shared by several commands."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from mc_core.aggregations import AGGREGATIONS
from mc_core.config import SEGMENTATIONS
from mc_core.errors import UserError
from mc_core.memories import MEMORIES
from train.shipped_configs import find_config

Kind = StrEnum("Kind", list(MEMORIES))  # type: ignore[misc]
Aggregation = StrEnum("Aggregation", list(AGGREGATIONS))  # type: ignore[misc]
Segmentation = StrEnum("Segmentation", list(SEGMENTATIONS))  # type: ignore[misc]


# `KEY=VALUE` arguments after a run.
OVERRIDES: Any = typer.Argument(
    metavar="[KEY=VALUE]...", help="changes of the model, such as model.layer.aggregation=mean"
)


def output_file(what: str, **options: Any) -> Any:
    """Return an option for an output file; its folder is checked before the command runs.

    Args:
        what: help text.
        options: further arguments of `typer.Option`.
    """
    return typer.Option(help=what, dir_okay=False, callback=_check_folder, **options)


def config_argument(what: str, metavar: str = "CONFIG") -> Any:
    """Return an argument that is a YAML file or the name of a shipped configuration.

    Args:
        what: help text.
        metavar: its name in the help.
    """
    return typer.Argument(
        metavar=metavar, help=f"{what}, or a name of `mc configs`", callback=_find_config
    )


def config_option(what: str, **options: Any) -> Any:
    """Return an option that is a YAML file or the name of a shipped configuration.

    Args:
        what: help text.
        options: further arguments of `typer.Option`.
    """
    return typer.Option(help=f"{what}, or a name of `mc configs`", callback=_find_config, **options)


def mesh_option() -> Any:
    """Return an option for the devices of an evaluation, such as `data=2,heads=4`."""
    return typer.Option(
        help="devices: sizes of data, fsdp, heads and context, as data=2,heads=4",
        show_default="one device",
    )


def opened_mesh(text: str | None) -> Any:
    """Return the mesh of `mesh_option`, of requested devices on a CPU; None for one device.

    Raises:
        UserError: a size is not allowed, or the product is not the number of devices.
    """
    if text is None:
        return None
    from mc_jax.sharding import request
    from train.config import parse_mesh

    sizes = parse_mesh(text)
    request(sizes.cpu_devices)
    from train.mesh import open_mesh

    return open_mesh(sizes, "--mesh")


def utf8(word: str) -> str:
    """Decode a command-line argument as UTF-8, independent of the locale.

    Raises:
        UserError: the argument is not UTF-8.
    """
    try:
        return word.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{word}: must be UTF-8 text") from error


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")
    return path


def _find_config(name: Path | None) -> Path | None:
    return None if name is None else find_config(name)
