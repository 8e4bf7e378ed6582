"""`mc parity`, also `python -m parity`. Commands import lazily, to start quickly."""

import time
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from mc_core.aggregations import AGGREGATIONS
from mc_core.errors import UserError
from mc_core.files import to_bytes, write_atomic
from mc_core.memories import MEMORIES
from parity.environment import MissingError, prepare
from train.cli.options import Aggregation, Kind, config_option, output_file

app = typer.Typer(help="Compare mc_jax with mc_torch.", no_args_is_help=True)

Device = StrEnum("Device", ["cpu", "cuda"])
Dtype = StrEnum("Dtype", ["float64", "float32", "bfloat16"])

WIDTH = 160  # of tables, if stdout is not a terminal


@app.command()
def check(
    full: Annotated[bool, typer.Option("--full/--quick", help="grid of cases to compare")] = False,
    device: Device = Device.cpu,
    dtype: Annotated[
        Dtype | None, typer.Option(help="dtype of all cases", show_default="as in the grid")
    ] = None,
    kind: Annotated[
        list[Kind] | None, typer.Option(help="select memories; may be repeated")
    ] = None,
    aggregation: Annotated[
        list[Aggregation] | None, typer.Option(help="select aggregations; may be repeated")
    ] = None,
    config: Annotated[
        Path | None, config_option("model to compare instead of the grid: YAML file of a run")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="run directory or .safetensors file with the weights")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="sequence length with --config or --checkpoint")
    ] = None,
    json: Annotated[Path | None, output_file("output file of all leaves, as JSON")] = None,
    markdown: Annotated[Path | None, output_file("output file of the table, as Markdown")] = None,
) -> None:
    """Compare outputs, cached states, gates and gradients on shared weights.

    Exit code 1 if any leaf differs.
    """
    _prepare(device)
    from parity import report
    from parity.check import check as compare_all
    from parity.grids import GRIDS

    weights = None
    if config or checkpoint:
        from train.cli.parity_case import own_case

        if full or kind or aggregation:
            raise UserError(
                "--full, --kind and --aggregation select cases of the grid: not supported here"
            )
        case, weights = _plain(own_case, config, checkpoint, dtype or "float64", tokens)
        cases = [case]
    else:
        if tokens:
            raise UserError("--tokens: requires --config or --checkpoint")
        cases = [
            case.where(dtype=str(dtype or case.dtype))
            for case in GRIDS["full" if full else "quick"]()
            # In bfloat16, rounding decides between nearly equal logits.
            if not (case.new_tokens and dtype == Dtype.bfloat16)
            and case.layer.memory.kind in (kind or MEMORIES)
            and case.layer.aggregation in (aggregation or AGGREGATIONS)
        ]
        if not cases:
            raise UserError("no case of the quick grid matches: use --full")
    start = time.perf_counter()
    outcomes = list(_with_progress(compare_all(cases, device, weights), len(cases)))
    result = (outcomes, str(device), time.perf_counter() - start)
    console = _console()
    console.print(report.table(outcomes))
    for line in (*report.failures(outcomes), report.summary(*result)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json:
        write_atomic(json, report.as_json(*result).encode())
    if markdown:
        write_atomic(markdown, to_bytes(report.as_markdown(*result)))
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def train(
    config: Annotated[
        Path | None, config_option("YAML file of a run", show_default="a small Titans model")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="number of steps")] = 20,
    tokens: Annotated[int | None, typer.Option(min=1, help="length of the sequences")] = None,
    plot: Annotated[
        Path | None, output_file("output file of a plot of losses and differences")
    ] = None,
) -> None:
    """Train one model in both frameworks, and compare every step.

    Exit code 1 if a loss, a gradient norm or a final parameter differs.
    """
    _prepare("cpu", "optax", "omegaconf")
    from parity import train as both
    from train.optimizer import make_optimizer

    options: dict[str, Any] = {"tokens": tokens} if tokens else {}
    if config:
        from train.config import load_config

        run = load_config(config)
        options = {"tokens": 2 * run.model.layer.segment_size + 5} | options
        options |= {"config": run.model, "optimizer": run.optimizer, "run_steps": run.run.steps}
    training = _plain(both.train, make_optimizer, steps=steps, **options)
    console = _console()
    console.print(both.table(training.steps))
    console.print(both.summary(training), soft_wrap=True, highlight=False)
    if plot:
        write_atomic(plot, both.draw(training, plot))
    if not training.ok:
        raise typer.Exit(1)


@app.command()
def selftest() -> None:
    """Inject faults into mc_torch, one at a time; each must be detected in the expected leaf.

    Exit code 1 if one is missed.
    """
    _prepare("cpu")
    from parity import faults

    start = time.perf_counter()
    findings = list(_with_progress(faults.selftest(), len(faults.FAULTS) + len(faults.CASES)))
    console = _console()
    console.print(faults.table(findings))
    line = faults.summary(findings, time.perf_counter() - start)
    console.print(line, soft_wrap=True, highlight=False)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _prepare(device: str, *packages: str) -> None:
    try:
        prepare(str(device), ("jax", "flax", "torch", *packages))
    except MissingError as error:
        raise UserError(str(error)) from error


def _plain(function: Any, *args: Any, **options: Any) -> Any:
    """Call a function, converting ValueError to UserError."""
    try:
        return function(*args, **options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _with_progress(steps: Iterable[Any], total: int) -> Iterable[Any]:
    console = Console(stderr=True)
    if not console.is_terminal:
        return steps
    return track(steps, "comparing", total, console=console, transient=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
