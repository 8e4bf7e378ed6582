"""Plots of a sweep's accuracies."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from mc_core.files import to_png
from train.sweeps import bits_per_byte
from train.sweeps.labels import label
from train.sweeps.results import RunResult, is_text
from train.sweeps.table import by_row, score

WIDTH, AGGREGATION, MODE = (
    f"model.layer.{x}" for x in ("d_model", "aggregation", "state_init_mode")
)
MARKERS = "osD^vP*XpHd<>8h"
COLORS = [*color_sequences["tab10"], *color_sequences["Set2"], *color_sequences["Dark2"]]


# Rows that differ only in width.
Lines = dict["RowStyle", list[tuple[RunResult, dict[str, float]]]]


class RowStyle(NamedTuple):
    """What determines the style of a row: memory (colour), aggregation (marker), mode (filling).

    Rows with other overrides are drawn as another memory.
    """

    memory: str
    aggregation: str
    mode: str

    @classmethod
    def of(cls, result: RunResult) -> "RowStyle":
        """Return the style of the row of a result."""
        given = result["overrides"]
        memory = label(result, WIDTH, AGGREGATION, MODE)
        return cls(memory, str(given.get(AGGREGATION, "")), str(given.get(MODE, "")))


class Legend:
    """Colours, markers and fillings of a plot, assigned in the order of first appearance."""

    def __init__(self, row_styles: Sequence[RowStyle]):
        memories, aggregations, modes = (
            dict.fromkeys(words) for words in zip(*row_styles, strict=True)
        )
        self._colors = {word: COLORS[i % len(COLORS)] for i, word in enumerate(memories)}
        self._markers = {word: MARKERS[i % len(MARKERS)] for i, word in enumerate(aggregations)}
        self._open = {word: word == "checkpoint" for word in modes}

    def style(self, row_style: RowStyle) -> dict[str, Any]:
        """Return the keyword arguments of `Axes.plot`."""
        color = self._colors[row_style.memory]
        face = "white" if self._open[row_style.mode] else color
        marker = self._markers[row_style.aggregation]
        return {"color": color, "marker": marker, "markerfacecolor": face, "markersize": 6}

    def sorted(self, row_styles: Iterable[RowStyle]) -> list[RowStyle]:
        """Sort by memory, then mode, as in the legend."""
        memories, modes = list(self._colors), list(self._open)
        return sorted(
            row_styles,
            key=lambda row_style: (memories.index(row_style.memory), modes.index(row_style.mode)),
        )

    def handles(self) -> Iterator[Line2D]:
        """Yield an entry for every colour, marker and filling that distinguishes rows."""
        plain: dict[str, Any] = {"color": "0.3", "linestyle": ""}
        for word, color in self._colors.items():
            yield Line2D([], [], color=color, linewidth=4, label=word)
        for word, marker in self._markers.items():
            if word:
                yield Line2D([], [], marker=marker, label=word, **plain)
        for word, hollow in self._open.items():
            if word:
                face = "white" if hollow else "0.3"
                yield Line2D([], [], marker="o", markerfacecolor=face, label=word, **plain)


def draw_sweep(title: str, results: Sequence[RunResult]) -> bytes:
    """Plot accuracy against width (or aggregation if there is one width) and against state bytes.

    Rows that differ only in width form a line. Error bars are 95% intervals. For sweeps on text,
    see `bits_per_byte.draw_sweep`.
    """
    if any(map(is_text, results)):
        return bits_per_byte.draw_sweep(title, by_row(results))
    lines: Lines = {}
    for own in by_row(results).values():
        good = [result for result in own if not result.get("error")]
        if good:
            lines.setdefault(RowStyle.of(good[0]), []).append((good[0], score(good)))
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    if lines:
        legend = Legend(list(lines))
        widths = {result["width"] for points in lines.values() for result, _ in points}
        if len(widths) > 1:
            _draw_lines(left, lines, legend, "width", "model width")
        else:
            _draw_groups(left, lines, legend)
        tokens = max(result["state_tokens"] for points in lines.values() for result, _ in points)
        words = f"KiB of a stream's state after {tokens} tokens"
        _draw_lines(right, lines, legend, "state_bytes", words, unit=1024)
        handles = list(legend.handles())
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize="small")
    left.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    figure.suptitle(f"{title}: accuracy on test examples")
    return to_png(figure)


def _draw_lines(
    axes: Axes, lines: Lines, legend: Legend, by: str, words: str, unit: int = 1
) -> None:
    for row_style, points in lines.items():
        points = [point for point in points if point[0][by] is not None]  # the model cannot stream
        points.sort(key=lambda point: point[0][by])
        places = [result[by] / unit for result, _ in points]
        _plot(axes, places, [one for _, one in points], legend, row_style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel=words)
    axes.grid(alpha=0.3)


def _draw_groups(axes: Axes, lines: Lines, legend: Legend) -> None:
    """Draw one group of points per aggregation, with memories and modes side by side."""
    names = []
    groups = sorted(
        dict.fromkeys(row_style.aggregation for row_style in lines), key=lambda word: not word
    )
    for place, group in enumerate(groups):
        row_styles = legend.sorted(
            row_style for row_style in lines if row_style.aggregation == group
        )
        names.append(group or (row_styles[0].memory if len(row_styles) == 1 else ""))
        for i, row_style in enumerate(row_styles):
            x = place + 0.8 * ((i + 0.5) / len(row_styles) - 0.5)
            scores = [one for _, one in lines[row_style]]
            _plot(axes, [x] * len(scores), scores, legend, row_style)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="aggregation")
    axes.grid(axis="y", alpha=0.3)


def _plot(
    axes: Axes,
    places: list[float],
    scores: list[dict[str, float]],
    legend: Legend,
    row_style: RowStyle,
) -> None:
    middle = [one["accuracy"] for one in scores]
    below = [one["accuracy"] - one["low"] for one in scores]
    above = [one["high"] - one["accuracy"] for one in scores]
    axes.errorbar(
        places, middle, [below, above], linewidth=1, elinewidth=0.8, **legend.style(row_style)
    )
