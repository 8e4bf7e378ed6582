"""Tables of recall slices."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mc_core.tables import ResultTable, Row
from train.evaluation.recall_slices import RARE

if TYPE_CHECKING:
    from train.evaluation.evaluate_recall import RecallReport


def tables(report: "RecallReport") -> list[ResultTable]:
    """Return one table per run; those of further runs show the difference to the first one."""
    first, *others = report.runs
    notes = _notes(report)
    titles = [f"{run['name']}, step {run['step']}: recall slices" for run in report.runs]
    rows = [[_row(one, report.unit) for one in first["slices"] if one["tokens"]]]
    for number, run in enumerate(others, 1):
        titles[number] += f", compared with {first['name']}"
        rows.append([_compared(one, report.unit) for one in run["slices"] if one["tokens"]])
    return [
        ResultTable(title, own, notes, report.machine, report.command)
        for title, own in zip(titles, rows, strict=True)
    ]


def _row(one: dict[str, Any], unit: str) -> Row:
    return {
        "slice": one["name"],
        f"{unit}s": one["tokens"],
        "%": f"{100 * one['share']:.1f}",
        f"bits/{unit}": f"{one['bits']:.3f}",
        "95% interval": _interval(one["bits_interval"], ".3f"),
        "contribution": f"{one['contribution']:.3f}",
    }


def _compared(one: dict[str, Any], unit: str) -> Row:
    return {
        "slice": one["name"],
        f"bits/{unit}": f"{one['bits']:.3f}",
        "difference": f"{one['difference']:+.3f}",
        "95% interval": _interval(one["difference_interval"], "+.3f"),
        "contribution": f"{one['contribution']:.3f}",
    }


def _interval(ends: Sequence[float | None], form: str) -> str:
    low, high = ends
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _notes(report: "RecallReport") -> list[str]:
    texts = report.text if isinstance(report.text, str) else ", ".join(report.text)
    unit, n = report.unit, report.ngram
    notes = [
        f"text: {texts}; {report.bytes:,} bytes, {report.tokens:,} predicted {unit}s, "
        f"{report.windows:,} windows of {report.window:,} {unit}s",
        f"hit: the last {n} {unit}s, up to and including the predicted one, occurred together "
        "before in the same window; miss: all but the predicted one did, with another continuation",
        f"distance: of hits, {unit}s to the last occurrence; count: of hits, occurrences of the "
        f"{n} {unit}s in the {report.training_tokens:,} {unit}s of the training text; rare: hits "
        f"with a count below {RARE}, by distance",
        "contribution: bits of the slice, divided by the bytes of the whole text",
        f"95% intervals: bootstrap over windows, {report.samples:,} samples, seed {report.seed}",
    ]
    if len(report.runs) > 1:
        notes.append(
            f"difference: bits/{unit} minus those of {report.runs[0]['name']} on the same {unit}s; "
            "its interval is paired"
        )
    return notes
