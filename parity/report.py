"""Report of a check: a table, JSON and Markdown."""

import dataclasses
import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from rich.table import Table

from mc_core.tables import counted
from parity.compare import Outcome

COLUMNS = ("case", "dtype", "leaves", "worst leaf", "error", "limit", "maximum", "cosine", "equal")
FRAMEWORKS = ("jax", "flax", "torch")


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return the cells of a case: the leaf with the largest error relative to its limit."""
    worst = outcome.worst
    return (
        outcome.case.name,
        outcome.case.dtype,
        str(len(outcome.differences)),
        worst.name,
        worst.problem or f"{worst.error:.1e}",
        f"{worst.limit:.0e}",
        f"{worst.maximum:.1e}",
        f"{worst.cosine:.6f}",
        "yes" if outcome.ok else "NO",
    )


def table(outcomes: Sequence[Outcome]) -> Table:
    """Return the table of all cases."""
    result = Table(*COLUMNS)
    for column in result.columns[4:8]:
        column.justify, column.no_wrap = "right", True
    for outcome in outcomes:
        result.add_row(*row(outcome), style=None if outcome.ok else "red")
    return result


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line for each failed case, with the first leaf in forward order that differs."""
    return [
        f"{outcome.case.name} {outcome.case.dtype}: first to diverge, in forward order: "
        f"{outcome.first_failure.describe()}"
        for outcome in outcomes
        if outcome.first_failure
    ]


def summary(outcomes: Sequence[Outcome], device: str, seconds: float) -> str:
    """Return a one-line summary."""
    failed = sum(not outcome.ok for outcome in outcomes)
    leaves = sum(len(outcome.differences) for outcome in outcomes)
    verdict = f"{failed} of {len(outcomes)} cases differ" if failed else "all equal"
    versions = ", ".join(f"{name} {version(name)}" for name in FRAMEWORKS)
    cases = counted(len(outcomes), "case")
    return f"{verdict}: {cases}, {leaves:,} leaves, {device}, {seconds:.0f} s ({versions})"


def as_json(outcomes: Sequence[Outcome], device: str, seconds: float) -> str:
    """Return all leaves of all cases, and the environment, as plain values."""
    data = {
        "ok": all(outcome.ok for outcome in outcomes),
        "device": device,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in FRAMEWORKS},
        "cases": [_plain(outcome) for outcome in outcomes],
    }
    return json.dumps(data, indent=1) + "\n"


def as_markdown(outcomes: Sequence[Outcome], device: str, seconds: float) -> str:
    """Return the table, the failures and the summary as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(row, outcomes)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows]
    lines += ["", *(f"- {line}" for line in failures(outcomes))]
    lines += ["", summary(outcomes, device, seconds)]
    return "\n".join(lines) + "\n"


def _plain(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    fields["config"] = case.config.to_dict()
    leaves = [dataclasses.asdict(leaf) | {"ok": leaf.ok} for leaf in outcome.differences]
    first = outcome.first_failure
    return {
        "name": case.name,
        **fields,
        "ok": outcome.ok,
        "seconds": round(outcome.seconds, 2),
        "worst": outcome.worst.name,
        "first_to_diverge": first.name if first else None,
        "leaves": leaves,
    }
