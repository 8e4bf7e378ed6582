"""The results of a sweep's runs: one JSON object a line."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_core.errors import UserError
from mc_core.files import write_atomic
from train.config import TextConfig
from train.sweep.config import Run

FILE = "results.jsonl"
Result = dict[str, Any]


def read_results(directory: Path) -> list[Result]:
    """Return the results so far; a last line that was cut off by a kill is left out."""
    path = directory / FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: a line is no JSON object: {error}: mend or delete it") from error


class Results:
    """Reads, and appends to, the results of a sweep; each is on the disk when `add` returns."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE
        self._rows = read_results(directory)
        whole = "".join(json.dumps(row) + "\n" for row in self._rows)
        if not self._path.exists() or self._path.read_text() != whole:
            write_atomic(self._path, whole.encode())

    def find(self, run: Run) -> Result | None:
        """Return the result of a run, or None.

        Raises:
            UserError: there is one of another configuration under its name.
        """
        wanted = (run.row, run.seed, run.rate)
        for row in self._rows:
            if (row["row"], row["seed"], row["rate"]) == wanted:
                if row["fingerprint"] != run.fingerprint:
                    raise UserError(
                        f"{self._path}: holds {run.row} of another config; "
                        "set another directory, or delete its line and its folder"
                    )
                return row
        return None

    def add(self, row: Result) -> None:
        """Append a result.

        Raises:
            OSError: it cannot be written.
        """
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(row)


def is_text(result: Result) -> bool:
    """Whether a result is that of a run on text, rather than on a recall task."""
    return bool(result.get("task") == TextConfig.task)


def best(results: Sequence[Result]) -> Result:
    """Return the result whose rate is chosen, as `mc sweep` states it.

    The highest validation accuracy; of equal ones the lowest loss, then the lowest rate. On text,
    the fewest bits per byte, then the lowest rate. A run that met a NaN is behind all others.
    """

    def key(row: Result) -> tuple[float, float, float]:
        if row.get("error"):
            return math.inf, 0.0, row["rate"]
        if is_text(row):
            return row["bits_per_byte"], 0.0, row["rate"]
        return -row["accuracy"], row["loss"], row["rate"]

    return min(results, key=key)
