"""Plots of accuracy: by pairs and distance, and by depth and length."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mc_core.files import to_png

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


def plot_scores(axes: Axes, places: Sequence[float], rows: Cells, label: str) -> None:
    """Draw accuracies with error bars."""
    middle = np.array([row["accuracy"] for row in rows])
    ends = np.array([[row["low"] for row in rows], [row["high"] for row in rows]])
    axes.errorbar(
        places, middle, abs(ends - middle), marker="o", markersize=4, capsize=2, label=label
    )
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
