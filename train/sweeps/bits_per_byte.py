"""Sweeps on text: bits per byte of the validation text, total and by position in the window."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mc_core.files import to_png
from mc_core.tables import ResultTable, Row
from parity.environment import result_table
from train.config import TrainConfig
from train.evaluation.run_report import TextReport
from train.sweeps.labels import shown
from train.sweeps.results import RunResult, made_with, without_state
from train.sweeps.sweep_config import SweepConfig

Rows = Mapping[str, Sequence[RunResult]]  # the results of each row, one per seed

RULE = (
    "rate: of those tried with the first seed, the one with the fewest bits per byte "
    "(ties: the lower rate)"
)
MEASURE = (
    "bits/byte: of the whole validation text, mean over the seeds; lowest and highest: over the "
    "seeds"
)
GAIN = (
    "gain: bits/byte fewer than the row without caching of the same window, mean over the seeds "
    "that both have; of several, the one that shares most settings"
)
STYLES = ("-", "--", ":", "-.")


def config_fields(config: TrainConfig) -> RunResult:
    """Return the result fields that depend only on the configuration."""
    model = config.model
    cacheless = not model.layer.rule.reads_cache and model.layer in model.block_layers
    return {"model": model.name, "cacheless": cacheless}


def measured_fields(report: TextReport) -> RunResult:
    """Return the measured fields of a result."""
    names = ("bits_per_byte", "validation_bytes", "validation_sha256", "unit", "positions")
    found = {name: getattr(report, name) for name in names}
    if report.heads is not None:
        found |= {"recall": report.heads.recall, "dead": report.heads.dead}
    if report.unit == "byte":
        return found
    lost = report.round_trip.lost if report.round_trip else 0.0
    return found | {"validation_tokens": report.validation_tokens, "lost": lost}


def describe(result: RunResult) -> str:
    """Return the measured value as text."""
    return f"{result['bits_per_byte']:.4f} bits per byte"


def baseline_of(own: Sequence[RunResult], rows: Rows) -> Sequence[RunResult] | None:
    """Return the runs of the baseline of a row, the comparable row without caching, or None.

    Comparable rows have the same window, validation text and number of tokens. Of several rows, the
    one that shares most overrides is used; ties: the one with the fewest bits. Rows without caching
    have no baseline.
    """
    first = own[0]
    if first["cacheless"]:
        return None
    others = [
        other
        for other in rows.values()
        if other[0]["cacheless"] and _comparable_fields(other) == _comparable_fields(own)
    ]

    def distance(other: Sequence[RunResult]) -> tuple[int, float]:
        left, right = first["overrides"], other[0]["overrides"]
        differ = sum(left.get(key) != right.get(key) for key in left.keys() | right.keys())
        return differ, float(np.mean([result["bits_per_byte"] for result in other]))

    return min(others, key=distance, default=None)


def _comparable_fields(own: Sequence[RunResult]) -> list[Any]:
    """Return the fields that must be equal in comparable rows: text, window and tokens."""
    buckets = [(b["start"], b["end"], b["tokens"]) for b in own[0]["positions"]]
    return [*(own[0][key] for key in ("state_tokens", "validation_sha256", "unit")), buckets]


def gains(own: Sequence[RunResult], other: Sequence[RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Return the gain of a row over another in bits, per seed.

    Returns:
        Gains in bits per byte [s], and in bits per token by position [s, buckets], for the seeds
        that both rows have.
    """
    pairs = [(a, b) for a in own for b in other if a["seed"] == b["seed"]]
    whole = np.array([b["bits_per_byte"] - a["bits_per_byte"] for a, b in pairs])
    parts = [bits([b])[0] - bits([a])[0] for a, b in pairs]
    return whole, np.array(parts).reshape(len(pairs), len(own[0]["positions"]))


def bits(own: Sequence[RunResult]) -> np.ndarray:
    """Return the bits per token by position of the runs of a row, [s, buckets]."""
    return np.array([[bucket["bits"] for bucket in result["positions"]] for result in own])


def models(rows: Rows) -> dict[str, str]:
    """Return a name for each row's model, `titans + grm`.

    Rows with the same name and window are distinguished by their overrides.
    """
    same: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for row, own in rows.items():
        key = (own[0]["model"], own[0]["state_tokens"])
        same.setdefault(key, {})[row] = own[0]["overrides"]
    made = {}
    for (model, _), overrides in same.items():
        keys = dict.fromkeys(key for given in overrides.values() for key in given)
        differ = [k for k in keys if len({repr(given.get(k)) for given in overrides.values()}) > 1]
        for row, given in overrides.items():
            made[row] = " ".join([model, *(shown(k, given[k]) for k in differ if k in given)])
    return made


def names(rows: Rows) -> dict[str, str]:
    """Return a name for each row, `titans + grm at 512`."""
    return {
        row: f"{model} at {rows[row][0]['state_tokens']}" for row, model in models(rows).items()
    }


def make_table(title: str, rows: Rows, config: SweepConfig, *, cells: bool = True) -> ResultTable:
    """Return a table with bits per byte, gain over no caching, size and cost of each row.

    With `cells`, the table also has rate, seeds, parameters and the bits of each bucket of
    positions, otherwise a note has the range of parameters.
    """
    good = _good(rows)
    name_of = names(rows)
    lines: list[Row] = []
    for row, own in rows.items():
        line: Row = {"row": name_of[row]}
        if cells:
            line |= {"rate": f"{own[0]['rate']:g}", "seeds": len(good.get(row, ()))}
        if row in good:
            line |= _measured(good[row], baseline_of(good[row], good))
        line |= _cost(own, good.get(row, ()), cells)
        if cells and row in good:
            mean = bits(good[row]).mean(0)
            for bucket, value in zip(good[row][0]["positions"], mean, strict=True):
                line[f"{bucket['start']}-{bucket['end'] - 1}"] = f"{value:.4f}"
        lines.append(line)
    rates = "the base's" if config.rates is None else ", ".join(f"{x:g}" for x in config.rates)
    notes = [RULE, f"rates tried: {rates}; seeds: {', '.join(map(str, config.seeds))}"]
    notes += [MEASURE, GAIN] if any("gain" in line for line in lines) else [MEASURE]
    every = [result for own in rows.values() for result in own]
    state = f"state: bytes of a cache after one{without_state(every)}"
    notes.append(f"at: tokens of a window; {state}; FLOPs: per token, forward")
    sizes = sorted({own[0]["parameters"] for own in good.values()})
    if sizes:
        notes.append(f"parameters: {sizes[0]:,} to {sizes[-1]:,}")
    if cells:
        units = {own[0]["unit"] for own in good.values()}
        notes.append(
            f"columns of positions: bits per {' or '.join(sorted(units))} at those positions"
        )
    notes.append(f"runs: {made_with(every)}")
    if len({own[0]["validation_sha256"] for own in good.values()}) > 1:
        notes.append("the rows were scored on different texts: only gains are comparable")
    lossy = [name_of[row] for row, own in good.items() if own[0].get("lost")]
    if lossy:
        notes.append(
            f"the tokenizer drops or changes text, so its bits/byte are not comparable: "
            f"{', '.join(lossy)}"
        )
    return result_table(title, lines, notes)


def _good(rows: Rows) -> dict[str, list[RunResult]]:
    """Return the successful runs of each row; rows without any are omitted."""
    good = {row: [result for result in own if not result.get("error")] for row, own in rows.items()}
    return {row: own for row, own in good.items() if own}


def _measured(own: Sequence[RunResult], other: Sequence[RunResult] | None) -> Row:
    each = [result["bits_per_byte"] for result in own]
    spread = len(each) > 1
    line: Row = {
        "bits/byte": f"{np.mean(each):.4f}",
        "lowest": f"{min(each):.4f}" if spread else None,
        "highest": f"{max(each):.4f}" if spread else None,
    }
    if other:
        whole, _ = gains(own, other)
        line["gain"] = f"{whole.mean():+.4f}" if len(whole) else None
    return line


def _cost(own: Sequence[RunResult], good: Sequence[RunResult], cells: bool) -> Row:
    return {
        "parameters": good[0]["parameters"] if good and cells else None,
        "state": own[0]["state_bytes"],
        "FLOPs": float(own[0]["flops_per_token"]),
        "s": float(np.mean([result["seconds"] for result in good])) if good else None,
        "failed": len(own) - len(good) or None,
    }


def draw_sweep(title: str, rows: Rows) -> bytes:
    """Plot bits by position, and the gain over no caching.

    Each row is a line, the mean over the seeds, and a band from the lowest to the highest seed.
    Colours denote models, line styles windows.
    """
    good = _good(rows)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    right.axhline(0.0, color="0.4", linewidth=0.8)
    model_of, name_of = models(good), names(good)
    colours = [*dict.fromkeys(model_of[row] for row in good)]
    windows = [*dict.fromkeys(own[0]["state_tokens"] for own in good.values())]
    for row, own in good.items():
        place = [(bucket["start"] + bucket["end"]) / 2 for bucket in own[0]["positions"]]
        colour = colours.index(model_of[row])
        style = STYLES[windows.index(own[0]["state_tokens"]) % len(STYLES)]
        plot_style = {"color": f"C{colour % 10}", "linestyle": style}
        _band(left, place, bits(own), plot_style, name_of[row])
        other = baseline_of(own, good)
        if other:
            _, parts = gains(own, other)
            if len(parts):
                _band(right, place, parts, plot_style, name_of[row])
    units = " or ".join(sorted({own[0]["unit"] for own in good.values()})) or "token"
    left.set(ylabel=f"bits per {units}", title="validation text")
    right.set(ylabel=f"bits per {units}", title="gain over no caching")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("position in the window (middle of each bucket)")
        axes.grid(alpha=0.3)
    if good:
        handles, labels = left.get_legend_handles_labels()
        right.legend(
            handles, labels, frameon=False, fontsize="x-small", handlelength=3, loc="center left",
            bbox_to_anchor=(1.0, 0.5),
        )  # fmt: skip
    figure.suptitle(f"{title}: bits by position, mean and range over the seeds")
    return to_png(figure)


def _band(
    axes: Axes, place: Sequence[float], values: np.ndarray, plot_style: dict[str, Any], name: str
) -> None:
    """Plot mean and range over s of values [s, buckets]."""
    axes.plot(place, values.mean(0), marker="o", markersize=3, label=name, **plot_style)
    axes.fill_between(
        place, values.min(0), values.max(0), color=plot_style["color"], alpha=0.15, linewidth=0
    )
