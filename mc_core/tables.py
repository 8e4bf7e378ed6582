"""Tables of results: rich tables for terminals, JSON for programs, Markdown for pages."""

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
    """Rows that share their columns, and all that is needed to have them again.

    Attributes:
        title: of the table.
        rows: values by column.
        notes: remarks, one line each.
        machine: the machine that gave the rows, and its software.
        command: the command that gave them.
    """

    title: str
    rows: Sequence[Row]
    notes: Sequence[str]
    machine: dict[str, Any]
    command: str

    def table(self) -> "Table":
        """Return the rows for a terminal."""
        from rich.table import Table

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
