"""Report of a finished run: table, curves and gates."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mc_core import Plan
from mc_core.files import to_png, write_atomic
from mc_core.tables import counted
from train.data.round_trip import RoundTrip
from train.evaluation.heads import HeadReport, print_heads
from train.evaluation.sample import Sample, print_sample
from train.evaluation.validation import References
from train.metrics import read_rows

FILE = "report.json"


@dataclass(frozen=True)
class TextReport:
    """Result of a text run, saved as JSON in the run directory."""

    name: str
    model: str  # memory and aggregation
    parameters: int
    steps: int
    tokens: int  # training tokens, including repetitions
    seconds: float  # training time, including compilation
    bits_per_byte: float
    validation_bytes: int
    validation_sha256: str
    documents: tuple[int, int]  # training, validation
    references: References
    unit: str  # "byte", or "token" if the run has a tokenizer
    positions: list[dict[str, Any]]  # bits per token by position in the window; see `by_position`
    sample: Sample | None = None
    separator: str | None = None  # description of the separator
    validation_tokens: int | None = None
    round_trip: RoundTrip | None = None  # tokenizer losses on the validation text
    heads: HeadReport | None = None  # on the first validation window
    commit: str | None = None  # of the source; see `source_commit`

    @property
    def lossy(self) -> bool:
        """True if the tokenizer drops or changes text."""
        return self.round_trip is not None and self.round_trip.lost > 0


def save_report(run: Path, report: TextReport) -> None:
    """Write `report.json`."""
    data = dataclasses.asdict(report) | {"references": report.references._asdict()}
    for name in ("sample", "round_trip"):
        if (part := getattr(report, name)) is not None:
            data[name] = part._asdict()
    write_atomic(run / FILE, (json.dumps(data, indent=2) + "\n").encode())


def load_report(run: Path) -> TextReport | None:
    """Return the report of a finished run, or None."""
    path = run / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text())
        data["references"] = References(**data["references"])
        data["documents"] = tuple(data["documents"])
        for name, kind in (("sample", Sample), ("round_trip", RoundTrip)):
            if data.get(name):
                data[name] = kind(**data[name])
        if data.get("heads"):
            data["heads"] = HeadReport(**data["heads"])
        return TextReport(**data)
    except (KeyError, TypeError, ValueError):
        return None  # report of another program or version


def siblings(run: Path, report: TextReport) -> list[TextReport]:
    """Return the reports of finished runs in the same folder that scored the same bytes.

    They include the run's own one if `report` is of a changed configuration. Unreadable reports are
    skipped.
    """
    here = run.resolve()
    found = []
    for path in sorted(here.parent.iterdir()):
        try:
            other = load_report(path)
        except OSError:
            continue
        # With overrides, the run's own report has another name.
        own = path == here and other is not None and other.name == report.name
        if other and not own and other.validation_sha256 == report.validation_sha256:
            found.append(other)
    return found


def print_report(console: Console, run: Path, report: TextReport) -> None:
    """Print a table of the run, other runs and the references, best first, and a summary.

    The loss by position, recall and dead heads, and the sample of the run follow.
    """
    console.print(
        f"\nvalidation: {report.validation_bytes:,} bytes of "
        f"{counted(report.documents[1], 'document')}; "
        f"training: {counted(report.documents[0], 'other document')}\n"
        "order-0 (entropy of the byte frequencies) and xz -9 use only the validation bytes",
        soft_wrap=True,
    )
    for line in text_notes(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    table = Table("what", "bits/byte", "difference", "params", "tokens", "time")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: list[tuple[float, list[str]]] = []
    for result in (report, *siblings(run, report)):
        size = [f"{result.parameters / 1e6:.3g} M", f"{result.tokens / 1e6:.3g} M"]
        size.append(f"{result.seconds:.0f} s")
        name = f"{result.name} ({result.model}{', lossy tokenizer' if result.lossy else ''})"
        rows.append((result.bits_per_byte, [name, *size]))
    names = ("uniform", "order-0", "xz -9")
    rows += [(bits, [name]) for name, bits in zip(names, report.references, strict=True)]
    table.columns[0].no_wrap = True
    for bits, (name, *rest) in sorted(rows, key=lambda row: row[0]):
        table.add_row(name, f"{bits:.3f}", f"{bits - report.bits_per_byte:+.3f}", *rest)
    console.print(table)
    console.print(verdict(report), soft_wrap=True)
    console.print(f"curves, checkpoints and plots: {run}\n", soft_wrap=True)
    print_positions(console, report)
    if report.heads:
        print_heads(console, report.heads)
    if report.sample:
        print_sample(console, report.name, report.sample)


def text_notes(report: TextReport) -> list[str]:
    """Return notes on the separator, the tokenizer and its losses."""
    notes = data_notes(report.separator, report.documents, report.round_trip)
    if report.unit == "token" and report.validation_tokens is not None:
        rate = report.validation_tokens / report.validation_bytes
        notes.append(f"the tokenizer makes {rate:.3f} tokens per byte of the validation text")
    return notes


def data_notes(
    separator: str | None, documents: tuple[int, int], round_trip: RoundTrip | None
) -> list[str]:
    """Return notes on the separator, for several documents, and the tokenizer's losses."""
    notes = []
    if separator is not None and max(documents) > 1:
        notes.append(f"between documents: {separator}")
    if round_trip is not None and round_trip.warning:
        notes.append(round_trip.warning)
    return notes


def print_positions(console: Console, report: TextReport) -> None:
    """Print the loss by position in the window."""
    table = Table("position", f"bits/{report.unit}", f"{report.unit}s", title="by position")
    for column in table.columns:
        column.justify = "right"
    for bucket in report.positions:
        span = f"{bucket['start']} to {bucket['end'] - 1}"
        table.add_row(span, f"{bucket['bits']:.3f}", f"{bucket['tokens']:,}")
    console.print(table)
    console.print(
        f"a {report.unit} at position i of its window is predicted from i + 1 {report.unit}s\n"
    )


def verdict(report: TextReport) -> str:
    """Return a sentence that compares the model with the references."""
    parts = []
    for name, bits in zip(("uniform", "order-0", "xz -9"), report.references, strict=True):
        gap = report.bits_per_byte - bits
        share = f"{abs(gap):.3f} bits per byte, {abs(gap) / bits:.0%}"
        parts.append(f"beats {name} by {share}" if gap < 0 else f"is worse than {name} by {share}")
    return f"{report.name}: {report.bits_per_byte:.3f} bits per byte; " + "; ".join(parts)


def draw_curves(run: Path) -> None:
    """Draw `curves.png` from the rows of the run."""
    rows = read_rows(run)
    panels = {
        "loss (nats per token)": "loss",
        "validation bits per byte": "validation_bits_per_byte",
        "validation accuracy": "validation_accuracy",
        "gradient norm": "grad_norm",
        "learning rate": "learning_rate",
    }
    panels = {title: key for title, key in panels.items() if any(key in row for row in rows)}
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, key) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        if key == "grad_norm":
            axes.set_yscale("log")
    write_atomic(run / "curves.png", to_png(figure))


def draw_router(run: Path, gates: dict[int, np.ndarray], plan: Plan) -> None:
    """Draw `router.png`: the weight of each memory in each token's read, one panel per block.

    Args:
        run: run directory.
        gates: for each block, mean over heads [t, n + 1], with the online memory last.
        plan: the segments.
    """
    tokens, memories = next(iter(gates.values())).shape
    figure = Figure(figsize=(10, 0.6 + 2.2 * len(gates)), layout="constrained")
    panels = figure.subplots(len(gates), 1, squeeze=False, sharex=True)[:, 0]
    # Square-root color scale: with many memories, most weights are small.
    largest = max(float(block.max()) for block in gates.values())
    scale = PowerNorm(0.5, vmin=0.0, vmax=max(1.0, largest))
    for axes, (number, block) in zip(panels, gates.items(), strict=True):
        image = axes.imshow(block.T, aspect="auto", norm=scale, interpolation="nearest")
        for border in plan.ends[:-1]:
            axes.axvline(border - 0.5, color="white", linewidth=0.6)
        axes.set(ylabel=f"block {number}")
        axes.set_yticks(range(memories), [*plan.memory_names, "online"])
    panels[0].set_title("gate weights of each token (mean over heads)")
    panels[-1].set_xlabel(f"token of a validation text of {tokens} tokens")
    figure.colorbar(image, ax=list(panels))
    write_atomic(run / "router.png", to_png(figure))
