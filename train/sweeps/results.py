"""The results of a sweep's runs: one JSON object per line."""

import fcntl
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_core.errors import UserError
from mc_core.files import to_json
from train.config import TextConfig
from train.sweeps.sweep_config import Run

FILE = "results.jsonl"
RunResult = dict[str, Any]
Key = tuple[str, int, float]  # row, seed, rate


def read_results(directory: Path) -> list[RunResult]:
    """Return the existing results, without an incomplete last line."""
    path = directory / FILE
    return read_file(path) if path.exists() else []


def read_file(path: Path) -> list[RunResult]:
    """Return the results in a file, without an incomplete last line.

    Raises:
        UserError: a line is not a result.
        OSError: the file cannot be read.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    results = []
    for number, line in enumerate(lines, 1):
        try:
            result = json.loads(line)
            # These fields form the key of a result, so they must be hashable.
            hash((key_of(result), result["fingerprint"]))
        except (ValueError, TypeError, KeyError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"{path}: line {number} is not a result of a run: {why}: correct or delete it"
            ) from error
        results.append(result)
    return results


def key_of(result: RunResult) -> Key:
    """Return the key of a result."""
    return result["row"], result["seed"], result["rate"]


def made_with(results: Sequence[RunResult]) -> str:
    """Return a note on the versions and machines of runs."""
    versions = _distinct(results, "versions", " ")
    commits = dict.fromkeys(result["commit"] for result in results if "commit" in result)
    if commits:
        versions = f"{versions or 'unknown versions'}, commit {', '.join(commits)}"
    machines = _distinct(results, "machine", ", ")
    made = f"made with {versions or 'unknown versions'}"
    if machines and not all("machine" in result for result in results):
        machines += "; others not recorded"
    return f"{made}, on {machines}" if machines else made


def _distinct(results: Sequence[RunResult], name: str, between: str) -> str:
    found = dict.fromkeys(
        between.join(f"{key} {value}" for key, value in result[name].items())
        for result in results
        if name in result
    )
    return "; ".join(found)


def without_state(results: Sequence[RunResult]) -> str:
    """Return a suffix of the note on state bytes if a result has no state bytes."""
    lacking = any(result["state_bytes"] is None for result in results)
    return "; empty where segments cannot stream" if lacking else ""


class Results:
    """The results of a sweep; `add` flushes them to disk.

    Several processes may append to one file.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE
        self._found: dict[Key, RunResult] = {}
        self._size = -1
        self.refresh()

    def refresh(self) -> None:
        """Read the results added by other processes."""
        size = self._path.stat().st_size if self._path.exists() else 0
        if size != self._size:
            self._found = {key_of(row): row for row in read_results(self._path.parent)}
            self._size = size

    def find(self, run: Run) -> RunResult | None:
        """Return the result of a run, or None.

        Raises:
            UserError: there is a result of the same name with another configuration or tokenizer.
        """
        row = self._found.get(run.key)
        if row is not None and row["fingerprint"] != run.fingerprint:
            raise UserError(
                f"{self._path}: has {run.row} of another config; "
                "set another directory, or delete its line and its folder"
            )
        if row is not None and "tokenizer" in row and row["tokenizer"] != run.tokenizer:
            raise UserError(
                f"{self._path}: has {run.row} with another tokenizer than data.tokenizer = "
                f"{run.config.tokenizer}: restore that file, set another directory, or delete "
                "its line and its folder"
            )
        return row

    def add(self, row: RunResult) -> None:
        """Append a result.

        Raises:
            OSError: the result cannot be written.
        """
        line = to_json(row).encode()
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            # An incomplete last line is from an interrupted process.
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._found[key_of(row)] = row


def is_text(result: RunResult) -> bool:
    """Return True for a run on text, False for a recall task."""
    return bool(result.get("task") == TextConfig.task)


def best(results: Sequence[RunResult]) -> RunResult:
    """Return the result with the best rate.

    The best rate has the highest validation accuracy; ties: the lowest loss, then the lowest rate.
    On text, it has the fewest bits per byte; ties: the lowest rate. Failed runs are the worst.
    """

    def key(row: RunResult) -> tuple[float, float, float]:
        failed = math.inf, 0.0, row["rate"]
        if row.get("error"):
            return failed
        text = is_text(row)
        figures = (row["bits_per_byte"], 0.0) if text else (-row["accuracy"], row["loss"])
        return (*figures, row["rate"]) if all(map(math.isfinite, figures)) else failed

    return min(results, key=key)
