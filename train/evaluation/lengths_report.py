"""Tables and plot of bits per byte by the length of the window."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from mc_core.files import to_png
from mc_core.tables import ResultTable, Row

if TYPE_CHECKING:
    from train.evaluation.evaluate_lengths import LengthReport


def tables(report: "LengthReport") -> list[ResultTable]:
    """Return the bits per byte by length of each model, then those by position in the window."""
    about = (report.machine, report.command)
    note = f"a {report.unit} at position i of its window is predicted from i + 1 {report.unit}s"
    by_length, by_position = [], []
    for model in report.models:
        title = f"{model['name']}, step {report.step}: bits per"
        rows = [_row(one) for one in model["lengths"]]
        by_length.append(ResultTable(f"{title} byte by window", rows, _notes(report), *about))
        title = f"{title} {report.unit} by position"
        by_position.append(ResultTable(title, _by_position(model), [note], *about))
    return by_length + by_position


def draw_lengths(report: "LengthReport") -> bytes:
    """Draw bits per byte by length, and by position in the longest window, one line per model.

    Bars are 95% intervals.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, model in enumerate(report.models):
        rows = model["lengths"]
        values, ends = [row["bits_per_byte"] for row in rows], [row["interval"] for row in rows]
        _plot(left, [row["length"] for row in rows], values, ends, f"C{number}", model["name"])
        places = rows[-1]["positions"]
        middles = [(place["start"] + place["end"] - 1) / 2 for place in places]
        values, ends = [place["bits"] for place in places], [place["interval"] for place in places]
        _plot(right, middles, values, ends, f"C{number}", model["name"])
    left.set(xlabel=f"{report.unit}s per window", ylabel="bits per byte")
    left.set_xticks(report.lengths)
    right.set(
        xlabel=f"position in windows of {report.lengths[-1]:,}", ylabel=f"bits per {report.unit}"
    )
    for axes in (left, right):
        axes.axvline(report.trained, color="gray", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize="small")
    figure.suptitle(f"{report.run}, step {report.step}; dotted: window of training")
    return to_png(figure)


def _plot(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float],
    ends: Sequence[Sequence[float | None]],
    color: str,
    label: str,
) -> None:
    bars = abs(np.array(ends, float).T - np.array(values))
    axes.errorbar(
        places, values, np.nan_to_num(bars), color=color, marker="o", markersize=4, capsize=2,
        label=label,
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _row(one: dict[str, Any]) -> Row:
    row: Row = {
        "window": f"{one['length']:,}",
        "bits/byte": f"{one['bits_per_byte']:.4f}",
        "95% interval": _interval(one["interval"], ".4f"),
    }
    for name in ("change", "difference"):
        if one[name] is not None:
            row[name] = f"{one[name]:+.4f}"
            row[f"{name}, 95%"] = _interval(one[f"{name}_interval"], "+.4f")
    return row


def _by_position(model: dict[str, Any]) -> list[Row]:
    """Return one row per range of positions, with one column per length."""
    rows: dict[tuple[int, int], Row] = {}
    for one in model["lengths"]:
        for place in one["positions"]:
            key = place["start"], place["end"]
            row = rows.setdefault(key, {"position": f"{key[0]} to {key[1] - 1}"})
            interval = _interval(place["interval"], ".3f")
            words = f" ({interval})" if interval else ""
            row[f"window {one['length']}"] = f"{place['bits']:.3f}{words}"
    return [rows[key] for key in sorted(rows)]


def _interval(ends: Sequence[float | None], form: str) -> str:
    low, high = ends
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _notes(report: "LengthReport") -> list[str]:
    texts = report.text if isinstance(report.text, str) else ", ".join(report.text)
    unit = report.unit
    notes = [
        f"text: {texts}; {report.bytes:,} bytes, {report.tokens:,} predicted {unit}s; trained with "
        f"windows of {report.trained:,}",
        "every window starts with an empty state; all lengths score the same tokens",
        f"95% intervals: bootstrap over {report.windows:,} windows of {report.lengths[-1]:,} "
        f"{unit}s, {report.samples:,} samples, seed {report.seed}; those of changes and "
        "differences are paired",
    ]
    if len(report.lengths) > 1:
        notes.append(f"change: from windows of {report.lengths[0]:,} {unit}s")
    if len(report.models) > 1:
        notes.append(f"difference: from {report.models[0]['name']} with the same window")
    return notes
