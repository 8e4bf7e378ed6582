"""Plots of accuracy by pairs, distance, depth and length, and of the bits of recall slices."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mc_core.files import to_png
from train.evaluation.recall_slices import RARE, span

Cells = Sequence[dict[str, float]]


def draw_recall(cells: Cells, parts: Cells, title: str) -> bytes:
    """Draw accuracy by number of pairs and by distance, one line per number of tokens.

    Bars are 95% intervals.

    Args:
        cells: with tokens, pairs, accuracy, low, high.
        parts: with tokens, distance, accuracy, low, high.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, rows, by in ((left, cells, "pairs"), (right, parts, "distance")):
        for tokens in dict.fromkeys(row["tokens"] for row in rows):
            own = [row for row in rows if row["tokens"] == tokens]
            plot_scores(axes, [row[by] for row in own], own, f"{tokens:.0f} tokens")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    left.set(xlabel="pairs", ylabel="accuracy at queries")
    right.set(xlabel="tokens from key to query, at least")
    left.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    return to_png(figure)


def draw_depths(cells: Cells, parts: Cells, title: str) -> bytes:
    """Draw a heat map of accuracy by depth and length.

    Args:
        cells: with tokens; the map's columns.
        parts: with tokens, depth, accuracy.
        title: of the figure.
    """
    lengths = [cell["tokens"] for cell in cells]
    depths = sorted({part["depth"] for part in parts})
    shares = np.zeros((len(depths), len(lengths)))
    for part in parts:
        shares[depths.index(part["depth"]), lengths.index(part["tokens"])] = part["accuracy"]
    size = (2.6 + 0.7 * len(lengths), 1.6 + min(4.0, 0.25 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="RdYlGn", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(lengths)), [f"{length:.0f}" for length in lengths])
    step = -(-len(depths) // 10)
    axes.set_yticks(range(0, len(depths), step), [f"{x:.0%}" for x in depths[::step]])
    axes.set(xlabel="tokens", ylabel="depth of the needle")
    axes.set_title(title, fontsize="small")
    figure.colorbar(image, label="needles found")
    return to_png(figure)


def draw_slices(runs: Sequence[dict[str, Any]], unit: str) -> bytes:
    """Draw the bits of hits by distance and by count in the training text, one line per run.

    With several runs, a second row shows the differences to the first one. Bars are 95% intervals.

    Args:
        runs: name and slices of each run; see `RecallReport`.
        unit: "byte" or "token".
    """
    rows = {"bits": f"bits per {unit}"}
    if len(runs) > 1:
        rows["difference"] = f"minus {runs[0]['name']}"
    groups = {
        "distance": f"{unit}s to the last occurrence",
        "rare": f"{unit}s to the last occurrence, count < {RARE}",
        "count": "count in the training text",
    }
    figure = Figure(figsize=(13, 0.6 + 3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(groups), squeeze=False, sharey="row")
    for (value, label), line in zip(rows.items(), panels, strict=True):
        for axes, group in zip(line, groups, strict=True):
            _plot_slices(axes, runs, group, value)
        line[0].set_ylabel(label)
    for axes, words in zip(panels[-1], groups.values(), strict=True):
        axes.set_xlabel(words)
    panels[0][0].legend(frameon=False, fontsize="small")
    figure.suptitle("hits: n-grams that occurred before in the window")
    return to_png(figure)


def _plot_slices(axes: Axes, runs: Sequence[dict[str, Any]], group: str, value: str) -> None:
    own = [one for one in runs[0]["slices"] if one["group"] == group]
    axes.set_xticks(range(len(own)), [span(one["low"], one["high"]) for one in own])
    axes.tick_params(axis="x", labelsize="small")
    for number, run in enumerate(runs):
        rows = [one for one in run["slices"] if one["group"] == group]
        places = [i for i, one in enumerate(rows) if one[value] is not None]
        middle = np.array([rows[i][value] for i in places])
        ends = np.array([rows[i][f"{value}_interval"] for i in places], float).reshape(-1, 2).T
        shift = 0.06 * (number - (len(runs) - 1) / 2)  # bars of several runs do not overlap
        axes.errorbar(
            np.array(places) + shift, middle, abs(ends - middle), color=f"C{number}",
            marker="o", markersize=4, capsize=2, label=run["name"],
        )  # fmt: skip
    if value == "difference":
        axes.axhline(0, color="gray", linewidth=0.8)
    axes.grid(alpha=0.3)


def plot_scores(axes: Axes, places: Sequence[float], rows: Cells, label: str) -> None:
    """Draw accuracies with error bars."""
    middle = np.array([row["accuracy"] for row in rows])
    ends = np.array([[row["low"] for row in rows], [row["high"] for row in rows]])
    axes.errorbar(
        places, middle, abs(ends - middle), marker="o", markersize=4, capsize=2, label=label
    )
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
