"""`mc bench scaling`: time and FLOPs by sequence length, with fitted exponents and a plot."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bench import jax_layers
from bench.layer import Grid, make_config
from bench.timing import WARM_CACHE_NOTE, alternate
from mc_core.files import to_png, write_atomic
from mc_core.tables import ResultTable, Row
from parity.environment import result_table


def run(grid: Grid, runs: int) -> ResultTable:
    """Time each aggregation at every length, for one kind and chunk size.

    Each length is compiled, timed and released before the next; aggregations alternate.
    """
    kind, chunk, segment = grid.kinds[0], grid.chunks[0], grid.segments[0]
    rows: list[Row] = []
    for tokens in grid.tokens:
        subjects = {
            aggregation: jax_layers.subject(
                make_config(grid, kind, aggregation, chunk, segment),
                grid.batch,
                tokens,
                dtype=grid.dtypes[0],
                backward=grid.passes[0] == "both",
                seed=grid.seed,
                name=aggregation,
            )
            for aggregation in grid.aggregations
        }
        times = alternate({name: s.run for name, s in subjects.items()}, runs, warmup=1)
        for name, timing in times.items():
            rows.append(
                {
                    "aggregation": name,
                    "tokens": tokens,
                    "ms": 1e3 * timing.median,
                    "processor ms": 1e3 * timing.processor_median,
                    "tokens/s": subjects[name].tokens / timing.median,
                    "GFLOP": (subjects[name].flops or 0) / 1e9,
                    "MiB": (subjects[name].bytes or 0) / 2**20,
                    "compile s": subjects[name].compile_s,
                }
            )
    notes = [WARM_CACHE_NOTE]
    if len(grid.tokens) > 1:
        for name, (ms, gflop) in exponents(rows).items():
            notes.append(f"{name}: time grows as tokens^{ms:.2f}, operations as tokens^{gflop:.2f}")
    title = f"Scaling: {kind}, chunk {chunk}, segments of {segment}, {grid.batch} sequences"
    return result_table(title, rows, notes)


def time_column() -> str:
    """Return the name of the time column to fit and plot.

    On a CPU, this is processor time, which is independent of other load. On an accelerator, it is
    wall-clock time, as processor time is that of the host.
    """
    return "processor ms" if jax.default_backend() == "cpu" else "ms"


def exponents(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return, for each aggregation, the exponents of time and FLOPs as powers of the length.

    Fitted by least squares of the logarithms.
    """
    found = {}
    for name in dict.fromkeys(row["aggregation"] for row in rows):
        own = [row for row in rows if row["aggregation"] == name]
        tokens = np.log([row["tokens"] for row in own])
        time, flops = (
            float(np.polyfit(tokens, np.log([row[column] for row in own]), 1)[0])
            for column in (time_column(), "GFLOP")
        )
        found[name] = time, flops
    return found


def draw(report: ResultTable, path: Path) -> None:
    """Plot time against tokens on logarithmic axes, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, (slope, _) in exponents(report.rows).items():
        own = [row for row in report.rows if row["aggregation"] == name]
        label = f"{name}: tokens^{slope:.2f}"
        axes.loglog(
            [r["tokens"] for r in own], [r[time_column()] for r in own], marker="o", label=label
        )
    axes.set(xlabel="tokens", ylabel=time_column(), title=report.title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    write_atomic(path, to_png(figure, dpi=150))
