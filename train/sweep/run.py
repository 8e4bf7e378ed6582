"""A sweep from its file to its table; what is finished is not done again."""

import io
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from bench.devices import request
from mc_core.errors import NotFiniteError
from mc_core.files import write_atomic
from mc_core.footprint import flops_per_token, state_bytes
from train.checkpoint import load_run
from train.config import DataConfig, TextConfig
from train.loop import train
from train.step import split
from train.sweep import text
from train.sweep.config import Run, SweepConfig, load_sweep, make_run, make_runs
from train.sweep.results import Result, Results, best, is_text
from train.sweep.table import draw_sweep, make_table
from train.tasks.evaluate import Options, run_tests, task_of
from train.tasks.recall import RecallReport

PACKAGES = ("jax", "flax", "numpy", "memory-caching-jax")


def sweep(
    path: Path, console: Console, *, markdown: Path | None = None, plot: Path | None = None
) -> list[Result]:
    """Train and test all runs of a sweep, or those that are missing; print and draw what they show.

    Every rate is tried with the first seed. The one with the best validation accuracy (of equal
    ones the lower loss, then the lower rate) is run with the other seeds, and those runs make the
    row's figures, which come from test examples. All rates' results are kept. On text, the rate
    with the fewest bits per byte is chosen, and the figures are those of the validation text.

    Args:
        path: the sweep's YAML file.
        console: where progress and the table are printed.
        markdown: where the table goes, too.
        plot: where the picture goes; None = `sweep.png` in the sweep's directory.

    Returns:
        the results of the runs that make the table.

    Raises:
        UserError: the sweep, or a run of it, is not allowed; nothing is trained then.
        OSError: a file cannot be read or written.
    """
    config = load_sweep(path)
    directory = Path(config.directory)
    first = make_runs(config)
    request(max(run.config.run.devices for runs in first.values() for run in runs))
    results = Results(directory)
    for runs in first.values():
        for run in runs:
            results.find(run)
    chosen: list[Result] = []
    total = sum(map(len, first.values())) + len(first) * (len(config.seeds) - 1)
    number = 0
    for run, is_choice in _plan(config, first, results):
        number += not is_choice or run.seed != config.seeds[0]
        result = results.find(run)
        if result is None:
            result = do(run)
            results.add(result)
            console.print(f"{number}/{total}  {describe(result)}", soft_wrap=True, highlight=False)
        if is_choice:
            chosen.append(result)
    table = make_table(path.stem, chosen, config)
    console.print(make_table(path.stem, chosen, config, cells=False).table())
    for line in table.footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if markdown:
        write_atomic(markdown, table.as_markdown().encode())
    picture = plot or directory / "sweep.png"
    write_atomic(picture, draw_sweep(path.stem, chosen))
    console.print(f"results and pictures: {directory}", soft_wrap=True, highlight=False)
    return chosen


def _plan(
    config: SweepConfig, first: dict[str, list[Run]], results: Results
) -> Iterator[tuple[Run, bool]]:
    """Yield the runs in turn, and whether each makes a row's figures.

    Those of the rates come first; what they found, `results` knows by then.
    """
    for row, runs in first.items():
        for run in runs:
            yield run, False
        found = [result for run in runs if (result := results.find(run))]
        rate = best(found)["rate"]
        (winner,) = (run for run in runs if run.rate == rate)
        for seed in config.seeds:
            chosen = seed == winner.seed
            yield winner if chosen else make_run(config, row, winner.overrides, seed, rate), True


def do(run: Run) -> Result:
    """Train and test one run, from its last checkpoint on where it has one.

    A run that meets a NaN or an infinity is a result, too: its `error` says where.
    """
    start = time.monotonic()
    config = run.config
    tokens = longest(config.data)
    result: Result = {
        "row": run.row,
        "overrides": run.overrides,
        "seed": run.seed,
        "rate": run.rate,
        "task": config.data.task,
        "width": config.model.layer.d_model,
        "state_bytes": state_bytes(config.model, tokens),
        "flops_per_token": flops_per_token(config.model, tokens),
        "state_tokens": tokens,
        "steps": config.run.steps,
        "fingerprint": run.fingerprint,
        "versions": {name: version(name) for name in PACKAGES},
    }
    if is_text(result):
        result |= text.about(config)
    try:
        report = train(config, Console(file=io.StringIO()))
    except NotFiniteError as error:
        return result | {"error": str(error), "wall_seconds": time.monotonic() - start}
    measured = text.outcome(report) if is_text(result) else recall_outcome(run, report)
    return result | {
        "parameters": report.parameters,
        **measured,
        "trained_tokens": report.tokens,
        "seconds": report.seconds,
        "wall_seconds": time.monotonic() - start,
    }


def longest(data: DataConfig) -> int:
    """Return the tokens of a window of text, or of the longest training example."""
    if isinstance(data, TextConfig):
        return data.window
    return max(size[0] if isinstance(size, tuple) else size for size in data.lengths)


def recall_outcome(run: Run, report: RecallReport) -> Result:
    """Return what a run on a recall task was worth on validation and on test examples."""
    _, model, _, _ = load_run(Path(run.config.run.directory))
    options = Options(examples=run.examples)
    found = run_tests(*split(model), run.config, task_of(run.config, options), options)
    score = report.score
    return {"accuracy": score["accuracy"], "loss": score["loss"], "test": found.cells}


def describe(result: Result) -> str:
    """Return a line about a run."""
    name = f"{result['row']} rate={result['rate']:g} seed={result['seed']}"
    if result.get("error"):
        return f"{name}: {result['error']}"
    if is_text(result):
        return f"{name}: {text.describe(result)}, {result['wall_seconds']:.0f} s"
    return (
        f"{name}: validation accuracy {result['accuracy']:.1%}, loss {result['loss']:.3f}, "
        f"{result['wall_seconds']:.0f} s"
    )
