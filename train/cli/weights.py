"""`mc convert` and `mc export`. Commands import lazily, to start quickly."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train.cli.options import OVERRIDES, config_option


class WeightsFormat(StrEnum):
    """Format of a weight file."""

    RUN = "run"
    SAFETENSORS = "safetensors"
    TORCH = "torch"


class SourceFormat(StrEnum):
    """Format of the source."""

    RUN = "run"
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    COMMUNITY = "community"
    HF = "hf"


def convert(
    source: Annotated[
        Path, typer.Argument(help="a run, a folder of mc export, a .safetensors or .pt file")
    ],
    target: Annotated[Path, typer.Argument(help="path to write; must not exist")],
    source_format: Annotated[
        SourceFormat | None,
        typer.Option("--from", help="community: see docs/migration.md", show_default="by the path"),
    ] = None,
    target_format: Annotated[
        WeightsFormat | None, typer.Option("--to", show_default="by the path")
    ] = None,
    config: Annotated[
        Path | None, config_option("configuration of the run to write: YAML file of a run")
    ] = None,
) -> None:
    """Convert weights between a run, a safetensors file and a PyTorch state_dict."""
    from train.config import load_config

    loaded = None if config is None else load_config(config)
    from train.convert import convert as run

    run(source, target, source_format, target_format, loaded, Console())


def export(
    run: Annotated[Path, typer.Argument(help="run directory")],
    folder: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code", help="add the model's code, for trust_remote_code=True without mc_torch"
        ),
    ] = False,
) -> None:
    """Write a run as a folder that Hugging Face transformers loads."""
    from train.export import export as run_export

    changes = overrides or ()
    run_export(run, folder, with_code=with_code, console=Console(), overrides=changes)
