"""Recorded results of an earlier sweep, for comparison."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

from mc_core.errors import UserError
from train.config import TextConfig
from train.sweeps.plan import runs_of_row
from train.sweeps.results import RunResult, key_of, made_with, read_file
from train.sweeps.sweep_config import Run, SweepConfig

NEEDED = ("accuracy", "loss", "test")


class Recorded(NamedTuple):
    """Recorded results for the rows of a sweep.

    Attributes:
        rows: for each row, the finished runs at the chosen rate; rows without any are omitted.
        notes: notes on the source of the results.
    """

    rows: dict[str, list[RunResult]]
    notes: list[str]


def read_recorded(path: Path, config: SweepConfig, first: dict[str, list[Run]]) -> Recorded:
    """Read the results of an earlier, possibly larger sweep for this sweep's rows.

    Rows are matched by name. Only runs with the rates and seeds of this sweep are used. As in a
    sweep, the runs at the best rate are selected.

    Args:
        path: `results.jsonl` of the earlier sweep.
        config: configuration of this sweep.
        first: for each row, the runs of all rates with the first seed.

    Raises:
        UserError: a line is not a result of a run, or the sweep is on text.
        OSError: the file cannot be read.
    """
    if any(isinstance(run.config.data, TextConfig) for runs in first.values() for run in runs):
        raise UserError(f"--recorded {path}: not supported for data.task = 'text'")
    found = {key_of(result): result for result in read_file(path)}
    for result in found.values():
        lacking = [key for key in NEEDED if key not in result]
        if lacking and not result.get("error"):
            raise UserError(f"{path}: {result['row']} has no {', '.join(lacking)}")
    rows: dict[str, list[RunResult]] = {}
    other = []
    for row, runs in first.items():
        tried = [found[run.key] for run in runs if run.key in found]
        if not tried:
            continue
        chosen = runs_of_row(config, runs, tried)
        chosen = [run for run in chosen if not found.get(run.key, {"error": 1}).get("error")]
        if chosen:
            rows[row] = [found[run.key] for run in chosen]
        if any(found[run.key]["fingerprint"] != run.fingerprint for run in chosen):
            other.append(row)
    what = "accuracy of the runs with these rates and seeds" if rows else "no matching rows"
    versions = f", {made_with([*chain(*rows.values())])}" if rows else ""
    notes = [f"recorded: {what} in {path}{versions}"]
    if other:
        notes.append(f"recorded with another configuration: {'; '.join(other)}")
    return Recorded(rows, notes)
