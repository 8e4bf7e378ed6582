"""`mc train`, `mc demo` and `mc sweep`. Commands import lazily, to start quickly."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train.cli.options import config_argument, output_file
from train.compilation_cache import use_compilation_cache


def train(
    config: Annotated[Path, config_argument("YAML file of a run")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="run.steps=100 ...")
    ] = None,
) -> None:
    """Train a language model, resume an interrupted run, or extend one to a larger run.steps."""
    use_compilation_cache()
    from train.config import load_config

    loaded = load_config(config, overrides or ())
    from train.distributed import initialize
    from train.loop import train as run

    initialize(loaded.run.distributed, loaded.run.mesh.cpu_devices)
    run(loaded, Console())


def demo(
    config: Annotated[
        Path, config_argument("sweep with two rows on needles: without and with a cache", "[SWEEP]")
    ] = Path("niah/quick"),
    picture: Annotated[
        Path | None,
        output_file("output file of the picture, PNG", show_default="demo.png of the sweep"),
    ] = None,
) -> None:
    """Train a model with and without cached memories to find needles, and draw the result."""
    use_compilation_cache()
    from train.demo import demo as run

    run(config, picture, Console())


def sweep(
    config: Annotated[Path, config_argument("YAML file of a sweep", metavar="SWEEP")],
    jobs: Annotated[int, typer.Option(help="number of parallel runs; each has its own cores")] = 1,
    markdown: Annotated[
        Path | None, typer.Option(help="output file of the table", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="output file of the plot", dir_okay=False, show_default="sweep.png"),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="results.jsonl of an earlier sweep, shown in a column for comparison"),
    ] = None,
) -> None:
    """Train and test the runs of a sweep, or resume an interrupted sweep."""
    use_compilation_cache()
    from train.sweeps.sweep import sweep as run

    run(config, Console(), jobs=jobs, markdown=markdown, plot=plot, recorded=recorded)
