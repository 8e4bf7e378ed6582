"""`mc plan`. Imports are lazy, because JAX must start with the right number of devices."""

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
    from train.config import load_config, parse_mesh

    configs = []
    for text in mesh or ["data=1"]:
        sizes = parse_mesh(text).sizes
        if -1 in sizes.values():
            raise UserError(f"--mesh {text}: all sizes must be >= 1, without -1")
        words = [f"run.mesh.{axis}={size}" for axis, size in sizes.items()]
        configs.append(load_config(config, [*(overrides or ()), *words]))
    _start_jax()
    from mc_jax.sharding import request
    from train.planning import plan as planning

    request(max(loaded.run.mesh.cpu_devices for loaded in configs))
    try:
        table = planning.run(configs, chip.value)
    except ValueError as error:
        raise UserError(str(error)) from error
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table.table())
    for line in table.footer():
        print(line)
    table.save(json, markdown)


def _start_jax() -> None:
    """Let JAX use the CPU, and compile without the optimizations of machine code.

    On CPUs, XLA removes the barriers that delay rematerialization, and may then keep the recomputed
    activations of all blocks at once. The plan keeps the barriers, as other backends do.
    """
    from parity.environment import flags, quick_compile

    barriers = "--xla_disable_hlo_passes=cse_barrier_expander"
    os.environ["XLA_FLAGS"] = f"{barriers} {flags(quick_compile())}"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # only errors of the partitioner
    import jax

    jax.config.update("jax_platforms", "cpu")
