"""Execution of a sweep: train and test its runs, and write its table and plot."""

import io
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from mc_core.errors import NotFiniteError
from mc_core.files import to_bytes, write_atomic
from mc_core.footprint import flops_per_token
from mc_core.installation import source_commit
from mc_jax.sharding import request
from parity.environment import machine
from train.checkpoint import load_run
from train.config import TextConfig
from train.evaluation.evaluate import run_tests, stream_bytes, task_of
from train.evaluation.options import EvaluationOptions
from train.interrupt import on_interrupt
from train.loop import train
from train.step import split
from train.sweeps import bits_per_byte
from train.sweeps.accuracy_plot import draw_sweep
from train.sweeps.plan import SweepPlan
from train.sweeps.recorded import read_recorded
from train.sweeps.results import Results, RunResult, is_text
from train.sweeps.sweep_config import Run, SweepConfig, load_sweep, make_runs
from train.sweeps.table import for_terminal, make_table
from train.sweeps.workers import Workers, check_jobs, one_thread
from train.tasks.recall import RecallReport

PACKAGES = ("jax", "flax", "numpy", "memory-caching-jax")
MACHINE = ("device", "processor", "cores", "Python")  # fields of the machine of a benchmark


def sweep(
    path: Path,
    console: Console,
    *,
    jobs: int = 1,
    markdown: Path | None = None,
    plot: Path | None = None,
    recorded: Path | None = None,
) -> list[RunResult]:
    """Train and test the runs of a sweep that have no result, and print and plot all results.

    Every rate is tried with the first seed. The rate with the best validation accuracy (ties: the
    lower loss, then the lower rate) is run with the other seeds. The table has the test accuracy of
    the runs at this rate; the results of all rates are saved. On text, the rate with the fewest
    bits per byte is chosen, and the table has the bits per byte of the validation text.

    Args:
        path: YAML file of the sweep.
        console: receives progress and the table.
        jobs: number of parallel runs; each has its share of the cores.
        markdown: output file of the table.
        plot: output file of the plot; None = `sweep.png` in the sweep's directory.
        recorded: `results.jsonl` of an earlier sweep; the table shows its accuracy.

    Returns:
        Results of the runs in the table.

    Raises:
        UserError: the configuration of the sweep or a run is invalid; nothing is trained.
        OSError: a file cannot be read or written.
    """
    check_jobs(jobs)
    config = load_sweep(path)
    directory = Path(config.directory)
    first = make_runs(config)
    recorded_rows = read_recorded(recorded, config, first) if recorded else None
    chosen = run_all(config, first, console, jobs)
    # A file name may not be valid text.
    title = os.fsencode(path.stem).decode(errors="replace")
    table = make_table(title, chosen, config, recorded=recorded_rows)
    short = make_table(title, chosen, config, recorded=recorded_rows, cells=False)
    console.print(for_terminal(short))
    for line in table.footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if markdown:
        write_atomic(markdown, to_bytes(table.as_markdown()))
    picture = plot or directory / "sweep.png"
    write_atomic(picture, draw_sweep(title, chosen))
    console.print(f"results and plots: {directory}", soft_wrap=True, highlight=False)
    return chosen


def run_all(
    config: SweepConfig, first: dict[str, list[Run]], console: Console, jobs: int
) -> list[RunResult]:
    """Train and test the runs of a sweep that have no result, and print a line about each.

    Args:
        config: configuration of the sweep.
        first: its runs with the first seed, by row, from `make_runs`.
        console: receives the lines.
        jobs: number of parallel runs.

    Returns:
        Results of every row at its best rate.
    """
    devices = max(run.config.run.mesh.cpu_devices for runs in first.values() for run in runs)
    request(devices)
    results = Results(Path(config.directory))
    for runs in first.values():
        for run in runs:
            results.find(run)
    with one_thread(), SweepPlan(config, first, results) as plan:
        finish(plan, jobs, console, devices)
        return plan.table()


def finish(plan: SweepPlan, jobs: int, console: Console, devices: int = 1) -> None:
    """Execute the remaining runs of a sweep, and print a line about each.

    Args:
        plan: queue of the runs.
        jobs: number of parallel runs.
        console: output console.
        devices: number of devices into which the runs split the CPU.
    """
    waits = False
    message = "interrupted: the same command resumes the sweep"
    with on_interrupt(lambda: message), Workers(jobs, do, devices) as workers:
        while True:
            while workers.busy < jobs and (run := plan.take()):
                workers.start(run)
            if workers.busy:
                for result in workers.results():
                    plan.add(result)
                    line = f"{plan.progress()}  {describe(result)}"
                    console.print(line, soft_wrap=True, highlight=False)
            elif plan.has_pending:
                if not waits:
                    console.print(
                        f"waiting for a run of another process: {plan.blocked}",
                        soft_wrap=True,
                        highlight=False,
                        markup=False,
                    )
                waits = True
                time.sleep(1.0)
            else:
                return


def do(run: Run) -> RunResult:
    """Train and test one run; resume from its last checkpoint, if any.

    A run that stops at a NaN or an infinity returns a result with an `error`.
    """
    start = time.monotonic()
    config = run.config
    tokens = max_example_tokens(run)
    result: RunResult = {
        "row": run.row,
        "overrides": run.overrides,
        "seed": run.seed,
        "rate": run.rate,
        "task": config.data.task,
        "width": config.model.layer.d_model,
        "state_bytes": stream_bytes(config.model, tokens),
        "flops_per_token": flops_per_token(config.model, tokens),
        "state_tokens": tokens,
        "steps": config.run.steps,
        "fingerprint": run.fingerprint,
        "commit": source_commit(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": run_machine(),
    }
    if run.tokenizer is not None:
        result["tokenizer"] = run.tokenizer
    if is_text(result):
        result |= bits_per_byte.config_fields(config)
    try:
        report = train(config, Console(file=io.StringIO()), claimed=True)
        if not math.isfinite(report.bits_per_byte if is_text(result) else report.score["loss"]):
            raise NotFiniteError("the validation loss is not finite")
    except NotFiniteError as error:
        return result | {"error": str(error), "wall_seconds": time.monotonic() - start}
    measured = (
        bits_per_byte.measured_fields(report) if is_text(result) else recall_outcome(run, report)
    )
    return result | {
        "parameters": report.parameters,
        **measured,
        "trained_tokens": report.tokens,
        "seconds": report.seconds,
        "wall_seconds": time.monotonic() - start,
    }


def run_machine() -> dict[str, Any]:
    """Return a description of the machine; in a worker, with the cores of the worker."""
    found = machine()
    return {name: found[name] for name in MACHINE} | {"NPROC": os.environ.get("NPROC")}


def max_example_tokens(run: Run) -> int:
    """Return the number of tokens of a text window or of the longest test example."""
    data = run.config.data
    if isinstance(data, TextConfig):
        return data.max_tokens
    return task_of(run.config, EvaluationOptions(examples=run.examples)).max_tokens


def recall_outcome(run: Run, report: RecallReport) -> RunResult:
    """Return accuracy and loss of a recall run on validation and test examples."""
    config, model, *_ = load_run(Path(run.config.run.directory))
    options = EvaluationOptions(examples=run.examples)
    found = run_tests(*split(model), config, task_of(config, options), options)
    score = report.score
    return {"accuracy": score["accuracy"], "loss": score["loss"], "test": found.cells}


def describe(result: RunResult) -> str:
    """Return a one-line description of a result."""
    name = f"{result['row']} rate={result['rate']:g} seed={result['seed']}"
    if result.get("error"):
        return f"{name}: {result['error']}"
    if is_text(result):
        return f"{name}: {bits_per_byte.describe(result)}, {result['wall_seconds']:.0f} s"
    return (
        f"{name}: validation accuracy {result['accuracy']:.1%}, loss {result['loss']:.3f}, "
        f"{result['wall_seconds']:.0f} s"
    )
