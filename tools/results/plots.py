"""Bar charts of the tables of `docs/evidence/tables.yaml` that name a picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mc_core.files import to_png
from tools.results.tables import column_runs, numbers, title


def draw(name: str, spec: Mapping[str, Any]) -> bytes:
    """Return the chart of a table as PNG: one group of bars per row, one bar per column.

    A bar is the mean over the seeds; dots are the seeds.
    """
    value = spec["value"] if isinstance(spec["value"], str) else spec["value"][0]
    rows, columns = list(spec["rows"]), list(spec.get("columns", {"": {}}))
    figure = Figure(figsize=(7, 0.7 + 0.22 * len(rows) * len(columns)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    cells = column_runs(name, spec)
    for number, column in enumerate(columns):
        seeds = [numbers(cells[row, column], value) for row in rows]
        places = np.arange(len(rows)) + (number - (len(columns) - 1) / 2) * height
        means = [float(np.mean(each)) if each else 0.0 for each in seeds]
        axes.barh(places, means, 0.9 * height, label=column, color=f"C{number}", alpha=0.6)
        for place, each in zip(places, seeds, strict=True):
            axes.plot(each, [place] * len(each), "o", color=f"C{number}", markersize=3)
    lowest = min(x for own in cells.values() for x in numbers(own, value))
    if value == "bits":
        axes.set_xlim(left=0.97 * lowest)
    axes.set_yticks(range(len(rows)), [row.replace("`", "") for row in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(title(value))
    if columns != [""]:
        figure.legend(loc="outside upper right", ncols=len(columns), fontsize="small")
    return to_png(figure)
