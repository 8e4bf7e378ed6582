"""Tables of results, as rich tables, JSON and Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mc_core.files import to_bytes, to_json, write_atomic

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True)
class ResultTable:
    """Table of results, with the information to reproduce it.

    Attributes:
        title: title of the table.
        rows: values by column.
        notes: remarks, one line each.
        machine: hardware and software versions.
        command: command that produced the rows.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str]
    machine: dict[str, Any]
    command: str

    def table(self) -> "Table":
        """Return the rows as a rich table."""
        from rich.table import Table

        table = Table(*self.columns, title=self.title)
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for row in self.rows:
            table.add_row(*(cell(row.get(name)) for name in self.columns))
        return table

    @property
    def columns(self) -> list[str]:
        """Names of columns in order of first appearance, without empty columns."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if any(row.get(name) is not None for row in self.rows)]

    def footer(self) -> list[str]:
        """Return the notes, the machine and the command, one line each."""
        about = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        return [*self.notes, about, self.command]

    def as_json(self) -> str:
        """Return the whole table as JSON, with unrounded numbers."""
        data = {name: getattr(self, name) for name in ("title", "command", "machine", "notes")}
        return to_json(data | {"rows": list(self.rows)}, indent=1)

    def as_markdown(self) -> str:
        """Return a Markdown section with the command, the table, the notes and the machine."""
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
        """Write the table to the given files.

        Raises:
            OSError: a file cannot be written.
        """
        if json:
            write_atomic(json, self.as_json().encode())
        if markdown:
            write_atomic(markdown, to_bytes(self.as_markdown()))


def cell(value: Any) -> str:
    """Format a value: three digits of a float, all digits of an integer, None as an empty cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def counted(number: int, noun: str) -> str:
    """Return a number and a noun, which gets an s unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
