"""What a measurement leaves: tables and pictures for people, JSON for programs."""

import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mc_core.files import to_bytes, to_json, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("jax", "flax", "torch", "memory-caching", "titans-pytorch", "flash-linear-attention")
SETTINGS = ("GLIBC_TUNABLES", "NPROC", "OMP_NUM_THREADS")
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Rows that share their columns, and all that is needed to have them again."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    command: str = field(default_factory=lambda: command())

    def table(self) -> Table:
        """Return the rows for a terminal."""
        made = Table(*self.columns, title=self.title)
        for column in made.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for row in self.rows:
            made.add_row(*(cell(row.get(name)) for name in self.columns))
        return made

    @property
    def columns(self) -> list[str]:
        """The rows' keys in the order of their first appearance, but those that no row fills."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if any(row.get(name) is not None for row in self.rows)]

    def footer(self) -> list[str]:
        """Return the notes, the machine and the command, a line each."""
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return [*self.notes, about, self.command]

    def as_json(self) -> str:
        """Return everything, numbers unrounded."""
        data = {name: getattr(self, name) for name in ("title", "command", "machine", "notes")}
        return to_json(data | {"rows": list(self.rows)}, indent=1)

    def as_markdown(self) -> str:
        """Return a section with the command, the table, the notes and the machine."""
        rows = [[cell(row.get(name)) for name in self.columns] for row in self.rows]
        marks = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [
            "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"
            for cells in (self.columns, marks, *rows)
        ]
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        notes = [f"{note}." for note in self.notes]
        return "\n".join(
            [f"## {self.title}", "", f"`{self.command}`", "", *lines, "", *notes, f"{about}.", ""]
        )

    def save(self, json: Path | None, markdown: Path | None) -> None:
        """Write the files that were asked for.

        Raises:
            OSError: the file system refuses.
        """
        if json:
            write_atomic(json, self.as_json().encode())
        if markdown:
            write_atomic(markdown, to_bytes(self.as_markdown()))


def cell(value: Any) -> str:
    """Return a number with three digits, a word as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def png(figure: "Figure", dpi: int = 120) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def machine() -> dict[str, Any]:
    """Return the processor, its cores and load, and the versions of what is installed."""
    import jax

    device = jax.devices()[0]
    found: dict[str, Any] = {
        "cores": len(cores()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "device": "CPU" if device.platform == "cpu" else device.device_kind,
        "processor": _processor(),
        "Python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def command() -> str:
    """Return the command that was given, with what the environment changes about its speed."""
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "mc", *sys.argv[1:]])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
