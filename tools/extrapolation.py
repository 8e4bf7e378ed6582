"""Table and plot of `mc evaluate --lengths` over seeds: `python -m tools.extrapolation FILE...`."""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from mc_core.files import to_json, to_png, write_atomic
from mc_core.tables import ResultTable

TRAINED = "as trained"  # the model without changes
Group = tuple[str, str]  # folder of the runs of all seeds, and the changes of the model


def collect(reports: Sequence[dict[str, Any]]) -> dict[Group, dict[int, list[dict[str, Any]]]]:
    """Return the scores of all seeds by group and by length of the window.

    Args:
        reports: written by `mc evaluate --lengths --json`.

    Raises:
        ValueError: the reports score different texts.
    """
    found: dict[Group, dict[int, list[dict[str, Any]]]] = {}
    texts = set()
    for report in reports:
        texts.add(report["sha256"])
        for model in report["models"]:
            group = Path(report["run"]).parent.name, " ".join(model["overrides"]) or TRAINED
            lengths = found.setdefault(group, defaultdict(list))
            for row in model["lengths"]:
                lengths[row["length"]].append(row)
    if len(texts) > 1:
        raise ValueError("the reports score different texts: use one text for all runs")
    return found


def make_table(found: dict[Group, dict[int, list[dict[str, Any]]]]) -> ResultTable:
    """Return the mean bits per byte over seeds, with the smallest and the largest value."""
    rows = []
    for (runs, changes), lengths in found.items():
        cells = {"runs": runs, "model": changes}
        for length, scores in sorted(lengths.items()):
            bits = [score["bits_per_byte"] for score in scores]
            cells[f"{length:,}"] = f"{mean(bits):.3f} ({min(bits):.3f}-{max(bits):.3f})"
        rows.append(cells)
    seeds = {len(scores) for lengths in found.values() for scores in lengths.values()}
    note = f"bits per byte by window: mean of {max(seeds)} seeds, smallest and largest value"
    return ResultTable("Bits per byte in longer windows", rows, [note], {}, "mc evaluate --lengths")


def draw(found: dict[Group, dict[int, list[dict[str, Any]]]]) -> bytes:
    """Draw the mean bits per byte by window, one panel per folder of runs."""
    folders = list(dict.fromkeys(runs for runs, _ in found))
    figure = Figure(figsize=(5.5 * len(folders), 4), layout="constrained")
    panels = figure.subplots(1, len(folders), squeeze=False, sharey=True)[0]
    for axes, folder in zip(panels, folders, strict=True):
        for (runs, changes), lengths in found.items():
            if runs != folder:
                continue
            places = sorted(lengths)
            bits = [[score["bits_per_byte"] for score in lengths[place]] for place in places]
            middle = [mean(values) for values in bits]
            below = [m - min(values) for m, values in zip(middle, bits, strict=True)]
            above = [max(values) - m for m, values in zip(middle, bits, strict=True)]
            label = changes.replace("model.layer.", "")
            axes.errorbar(places, middle, [below, above], marker="o", capsize=2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(folder, fontsize="small")
        axes.set_xlabel("bytes per window")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte")
    panels[0].legend(frameon=False, fontsize="x-small")
    return to_png(figure)


def as_record(reports: Sequence[dict[str, Any]]) -> bytes:
    """Return one line of JSON per report, without the bits by position."""
    lines = []
    for report in reports:
        models = [
            model
            | {"lengths": [{k: v for k, v in row.items() if k != "positions"} for row in rows]}
            for model in report["models"]
            for rows in [model["lengths"]]
        ]
        lines.append(to_json(report | {"models": models}))
    return "".join(lines).encode()


def main() -> None:
    """Print the table, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON file of each run")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--record", type=Path, help="output file of all numbers, as JSON lines")
    given = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in given.files]
    found = collect(reports)
    table = make_table(found)
    print(table.as_markdown())
    table.save(None, given.markdown)
    if given.plot:
        write_atomic(given.plot, draw(found))
    if given.record:
        write_atomic(given.record, as_record(reports))


if __name__ == "__main__":
    main()
