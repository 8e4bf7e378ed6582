"""What a sweep found, as a table and as a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from bench.report import Report, Row
from train.sweep import text
from train.sweep.config import SweepConfig
from train.sweep.results import Result, is_text
from train.tasks.pictures import plot_scores, png
from train.tasks.score import wilson

RULE = (
    "rate: of those that were tried with the first seed, the one with the best validation "
    "accuracy (of equal ones the lower loss, then the lower rate)"
)
MEASURE = (
    "accuracy: all test cells and seeds together, with Wilson's 95% interval for independent "
    "questions; lowest and highest: over the seeds"
)


def by_row(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results of each row, in order."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    return rows


def score(results: Sequence[Result]) -> dict[str, float]:
    """Return the accuracy on all test cells of several runs, with its interval."""
    cells = [cell for result in results for cell in result["test"]]
    right, asked = (sum(cell[name] for cell in cells) for name in ("right", "asked"))
    low, high = wilson(int(right), int(asked))
    return {"accuracy": right / asked, "low": low, "high": high}


def label(result: Result, *without: str) -> str:
    """Return the values of a row's overrides, but those of some keys."""
    values = [str(value) for key, value in result["overrides"].items() if key not in without]
    return " ".join(values) or "base"


def make_table(
    title: str, results: Sequence[Result], config: SweepConfig, *, cells: bool = True
) -> Report:
    """Return a line a row: its rate, its size and its accuracy.

    With `cells` also the spread over the seeds and each test cell, which makes a wide table. That
    of text is `text.make_table`'s.
    """
    if any(map(is_text, results)):
        return text.make_table(title, by_row(results), config, cells=cells)
    rows = [_line(name, own, cells) for name, own in by_row(results).items()]
    tokens = max((result["state_tokens"] for result in results), default=0)
    rates = "the base's" if config.rates is None else ", ".join(f"{x:g}" for x in config.rates)
    seeds = ", ".join(map(str, config.seeds))
    notes = [RULE, f"rates tried: {rates}; seeds: {seeds}", MEASURE]
    notes.append(f"state: bytes of a stream's cache after {tokens} tokens, all layers")
    return Report(title, rows, notes)


def _line(name: str, own: list[Result], cells: bool) -> Row:
    good = [result for result in own if not result.get("error")]
    row: Row = {
        "row": name if cells else label(own[0]),
        "rate": f"{own[0]['rate']:g}",
        "seeds": len(good),
    }
    if not good:
        return row | {"state": own[0]["state_bytes"], "failed": len(own)}
    whole, each = score(good), [100 * score([result])["accuracy"] for result in good]
    row |= {
        "parameters": good[0]["parameters"] if cells else None,
        "state": good[0]["state_bytes"],
        "accuracy %": 100 * whole["accuracy"],
        "from %": 100 * whole["low"],
        "to %": 100 * whole["high"],
        "lowest %": min(each) if cells and len(each) > 1 else None,
        "highest %": max(each) if cells and len(each) > 1 else None,
        "failed": len(own) - len(good) or None,
    }
    for number, cell in enumerate(good[0]["test"] if cells else ()):
        same = [result["test"][number] for result in good]
        right, asked = (sum(one[key] for one in same) for key in ("right", "asked"))
        size = ":".join(str(cell[key]) for key in ("tokens", "pairs") if key in cell)
        row[size] = 100 * right / asked
    return row | {"s": sum(result["seconds"] for result in good) / len(good)}


def draw_sweep(title: str, results: Sequence[Result]) -> bytes:
    """Draw accuracy against width and against state bytes.

    Rows that differ in their width alone are a line. Bars are 95% intervals. The picture
    of text is `text.draw_sweep`'s.
    """
    if any(map(is_text, results)):
        return text.draw_sweep(title, by_row(results))
    lines: dict[str, list[tuple[Result, dict[str, float]]]] = {}
    for own in by_row(results).values():
        good = [result for result in own if not result.get("error")]
        if good:
            name = label(good[0], "model.layer.d_model")
            lines.setdefault(name, []).append((good[0], score(good)))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, by, words in zip(
        figure.subplots(1, 2, sharey=True),
        ("width", "state_bytes"),
        ("model width", "bytes of a stream's state"),
        strict=True,
    ):
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point[0][by])
            places = [result[by] for result, _ in points]
            plot_scores(axes, places, [one for _, one in points], name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(xlabel=words)
    if lines:
        axes.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{title}: accuracy on test examples")
    return png(figure)
