"""`mc plan`. Imports are lazy, because JAX must start with the right number of devices."""

import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mc_core.chips import CHIPS
from mc_core.errors import UserError
from train.cli.options import config_argument, output_file

ChipName = StrEnum("ChipName", list(CHIPS))  # type: ignore[misc]

WIDTH = 200  # of tables, if stdout is not a terminal


def plan(
    config: Annotated[Path, config_argument("YAML file of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(
            help="sizes of data, fsdp, heads and context, as data=8,fsdp=8; may be repeated",
            show_default="data=1",
        ),
    ] = None,
    chip: Annotated[ChipName, typer.Option(help="chip whose peak rates are used")] = ChipName(
        "h100"
    ),
    json: Annotated[Path | None, output_file("output file of all numbers, as JSON")] = None,
    markdown: Annotated[Path | None, output_file("output file of the table, as Markdown")] = None,
) -> None:
    """Estimate memory, communication and time of a training step on devices that need not exist.

    The step is compiled for as many simulated CPU devices; nothing is allocated.
    """
    from parity.environment import flags, quick_compile

    os.environ["XLA_FLAGS"] = flags(quick_compile())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only errors of the partitioner
    from mc_jax.sharding import request
    from train.config import load_config
    from train.planning import plan as planning

    meshes = [planning.parse_mesh(text) for text in mesh or ["data=1"]]
    loaded = load_config(config, overrides or ())
    for sizes in meshes:
        planning.check(loaded, sizes)
    _use_cpu()
    request(max(math.prod(sizes.values()) for sizes in meshes))
    try:
        table = planning.run(loaded, meshes, chip.value)
    except ValueError as error:
        raise UserError(str(error)) from error
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table.table())
    for line in table.footer():
        print(line)
    table.save(json, markdown)


def _use_cpu() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
