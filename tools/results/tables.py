"""Tables of recorded runs, described in `docs/evidence/tables.yaml`.

A table has rows and columns. Both select runs by their overrides: a cell shows the runs whose
overrides are exactly those of its row and column. Keys are the last part of a dotted key.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from mc_core.errors import UserError
from tools.extrapolation import TRAINED, collect
from train.sweeps.results import RunResult, read_file

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Selection = Mapping[str, Any]


def render(page: str, specs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a page with the content of its marked tables generated.

    Raises:
        UserError: a table is unknown, or a cell has no run.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name not in specs:
            raise UserError(f"table {name!r} is not in tables.yaml; it has {', '.join(specs)}")
        return start + "\n".join(["", *table_lines(name, specs[name]), "", ""]) + end

    return MARKED.sub(replace, page)


def read_specs() -> dict[str, dict[str, Any]]:
    """Return the descriptions of all tables by name."""
    return yaml.safe_load((EVIDENCE / "tables.yaml").read_text(encoding="utf-8"))


def table_lines(name: str, spec: Mapping[str, Any]) -> list[str]:
    """Return the Markdown lines of a table.

    Args:
        name: name of the table.
        spec: with the key `slices` or `lengths`, as in `slice_lines` or `length_lines`. Otherwise
            `record` (a file or list of files), `rows` and `columns` (label -> overrides; a row with
            `only` has runs in that column alone), `common` (overrides of all cells; those of
            columns and then of rows take precedence), `seeds` (default: all), `value` (one or
            several of `accuracy`, `bits`, `recall`, `state` and `test <tokens>`), `empty` (text of
            cells without runs; without it, they are an error) and `cost` (true: state and
            operations of the row's first run).
    """
    if "slices" in spec:
        return slice_lines(spec)
    if "lengths" in spec:
        return length_lines(spec)
    columns: Mapping[str, Selection] = spec.get("columns", {"": {}})
    values = [spec["value"]] if isinstance(spec["value"], str) else spec["value"]
    head = [
        ", ".join(filter(None, [column, title(value) if len(values) > 1 or not column else ""]))
        for column in columns
        for value in values
    ]
    head += ["state", "kFLOP per token"] * bool(spec.get("cost"))
    lines = [_line([spec.get("corner", ""), *head]), _line(["---", *["---:"] * len(head)])]
    found = column_runs(name, spec)
    for row in spec["rows"]:
        cells = [
            shown(found[row, column], value) or str(spec.get("empty", ""))
            for column in columns
            for value in values
        ]
        if spec.get("cost"):
            run = next(found[row, column][0] for column in columns if found[row, column])
            cells += [shown([run], "state"), f"{run['flops_per_token'] / 1000:,.0f}"]
        lines.append(_line([row, *cells]))
    return lines


def slice_lines(spec: Mapping[str, Any]) -> list[str]:
    """Return the Markdown lines of a table of recall slices.

    Args:
        spec: `slices` (a file that `mc evaluate --recall` has written), `rows` (names of slices)
            and `columns` (labels of its runs: the first shows bits per token, the others their
            difference to the first).
    """
    found = json.loads((EVIDENCE / spec["slices"]).read_text(encoding="utf-8"))["runs"]
    head = ["slice", "% of tokens", *spec["columns"]]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for name in spec["rows"]:
        own = [next(row for row in run["slices"] if row["name"] == name) for run in found]
        cells = [f"{100 * own[0]['share']:.1f}", f"{own[0]['bits']:.2f}"]
        cells += [f"{row['difference']:+.2f}" for row in own[1:]]
        lines.append(_line([name, *cells]))
    return lines


def length_lines(spec: Mapping[str, Any]) -> list[str]:
    """Return the Markdown lines of a table of bits per byte by length of the window.

    Args:
        spec: `lengths` (a file that `tools.extrapolation --record` has written), `corner`, and
            `rows` (label -> the folder of the runs and the changes of the model).
    """
    text = (EVIDENCE / spec["lengths"]).read_text(encoding="utf-8")
    found = collect([json.loads(line) for line in text.splitlines()])
    windows = sorted(next(iter(found.values())))
    head = [spec["corner"], *(f"{window:,}" for window in windows)]
    lines = [_line(head), _line(["---", *["---:"] * len(windows)])]
    for label, (runs, *changes) in spec["rows"].items():
        scores = found[runs, " ".join(f"model.layer.{change}" for change in changes) or TRAINED]
        cells = [_mean([row["bits_per_byte"] for row in scores[window]], 3) for window in windows]
        lines.append(_line([label, *cells]))
    return lines


def column_runs(name: str, spec: Mapping[str, Any]) -> dict[tuple[str, str], list[RunResult]]:
    """Return the runs of each cell of a table, by the labels of its row and column.

    Raises:
        UserError: a cell has no run, and the table has no `empty`.
    """
    records = [spec["record"]] if isinstance(spec["record"], str) else spec["record"]
    runs = [run for record in records for run in recorded(record)]
    runs = [run for run in runs if run["seed"] in spec.get("seeds", [run["seed"]])]
    columns: Mapping[str, Selection] = spec.get("columns", {"": {}})
    cells: dict[tuple[str, str], list[RunResult]] = {}
    for (label, row), (head, column) in itertools.product(spec["rows"].items(), columns.items()):
        if only := row.get("only"):
            own = {key: value for key, value in row.items() if key != "only"}
            cells[label, head] = select(runs, own) if head == only else []
            continue
        cells[label, head] = select(runs, spec.get("common", {}) | column | row)
        if not cells[label, head] and "empty" not in spec:
            raise UserError(f"table {name!r}: no run of {label!r} with {dict(column)}")
    return cells


@cache
def recorded(record: str) -> tuple[RunResult, ...]:
    """Return the successful runs of a recorded sweep, at the best of the tried rates."""
    runs = [run for run in read_file(EVIDENCE / record) if not run.get("error")]
    rates: dict[str, set[float]] = {}
    for run in runs:
        rates.setdefault(run["row"], set()).add(run["rate"])
    chosen = {row: _best_rate(row, tried, runs) for row, tried in rates.items()}
    return tuple(run for run in runs if run["rate"] == chosen[run["row"]])


def _best_rate(row: str, rates: set[float], runs: Sequence[RunResult]) -> float:
    if len(rates) == 1:
        return next(iter(rates))
    first = [run for run in runs if run["row"] == row and run["seed"] == 0]
    return min(first, key=lambda run: (-run["accuracy"], run["loss"], run["rate"]))["rate"]


def select(runs: Sequence[RunResult], wanted: Selection) -> list[RunResult]:
    """Return the runs with exactly these overrides, in the order of their seeds."""
    found = [run for run in runs if _short(run["overrides"]) == dict(wanted)]
    return sorted(found, key=lambda run: run["seed"])


def _short(overrides: Selection) -> dict[str, Any]:
    return {key.rpartition(".")[2]: value for key, value in overrides.items()}


def title(value: str) -> str:
    """Return the title of a column of values."""
    names = {"bits": "bits per byte", "state": "state", "accuracy": "accuracy, %"}
    names["recall"] = "recall of a segment"
    return names.get(value) or value.removeprefix("test ") + " tokens, %"


def shown(runs: Sequence[RunResult], value: str) -> str:
    """Return the mean over the seeds, with the range of several ones."""
    if not runs:
        return ""
    if value == "state":
        return f"{runs[0]['state_bytes'] / 1000:,.0f} kB"
    each = numbers(runs, value)
    return _mean(each, {"bits": 3, "recall": 2}.get(value, 1))


def _mean(each: Sequence[float], digits: int) -> str:
    text = f"{mean(each):.{digits}f}"
    return text if len(each) == 1 else f"{text} ({min(each):.{digits}f}–{max(each):.{digits}f})"


def numbers(runs: Sequence[RunResult], value: str) -> list[float]:
    """Return a value of each run."""
    return [_number(run, value) for run in runs]


def _number(run: RunResult, value: str) -> float:
    if value == "bits":
        return float(run["bits_per_byte"])
    if value == "recall":
        heads = itertools.chain.from_iterable(run["recall"])
        return mean(recall for recall in heads if recall is not None)
    wanted = int(value.removeprefix("test ")) if value.startswith("test ") else None
    cells = [cell for cell in run["test"] if wanted in (None, cell["tokens"])]
    return 100 * sum(cell["right"] for cell in cells) / sum(cell["asked"] for cell in cells)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
