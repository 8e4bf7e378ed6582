"""Partial outputs: finished rows, stored in a separate file until the output is complete."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc_core.errors import UserError
from mc_core.files import write_atomic
from train.lock import Lock
from train.stdio import json_line

OutputRow = dict[str, Any]


class Partial:
    """Finished rows of `output`, in `<output>.partial`.

    The first line has the settings on which the rows depend; every other line has a row and the key
    of its input. An incomplete last line is dropped.

    Args:
        output: the final output file.
        settings: settings on which the rows depend, as plain values.
        keys: keys of all inputs, in order; a row is reused if its key is equal.

    Attributes:
        path: the partial file.
        rows: finished rows, a prefix of all rows.

    Raises:
        UserError: the file has rows of other settings or inputs, or is invalid.
        OSError: the file cannot be read.
    """

    def __init__(self, output: Path, settings: dict[str, Any], keys: Sequence[str]):
        self.path = output.with_name(f"{output.name}.partial")
        self.rows: list[OutputRow] = []
        self._output, self._keys = output, keys
        self._settings = json.loads(json.dumps(settings))
        self._size = 0  # of the complete lines
        if self.path.exists():
            *lines, rest = self.path.read_bytes().split(b"\n")
            self._size = self.path.stat().st_size - len(rest)
            self._load(lines)

    @staticmethod
    def lock(output: Path) -> Lock:
        """Return the lock that a writer of `output` must acquire."""
        return Lock(output.with_name(f".{output.name}.lock"), output, "use another --output")

    def add(self, rows: Sequence[OutputRow]) -> None:
        """Append the next rows and flush them to disk.

        Raises:
            OSError: the rows cannot be written; earlier rows are unchanged.
        """
        lines = [] if self._size else [json_line({"settings": self._settings})]
        first = len(self.rows)
        keyed = zip(self._keys[first : first + len(rows)], rows, strict=True)
        lines += [json_line({"key": key, "row": row}) for key, row in keyed]
        data = b"".join(lines)
        try:
            with self.path.open("ab") as file:
                file.truncate(self._size)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(data)
        self.rows += rows

    def finish(self) -> None:
        """Write the output and delete the partial file.

        Raises:
            OSError: the output cannot be written.
        """
        write_atomic(self._output, b"".join(map(json_line, self.rows)))
        self.path.unlink(missing_ok=True)

    def __str__(self) -> str:
        if not self.rows:
            return "no row is finished"
        return f"{len(self.rows)} of {len(self._keys)} rows are saved in {self.path}"

    def _load(self, lines: Sequence[bytes]) -> None:
        """Read the rows of the complete lines of the file."""
        advice = f"delete it to start over, or use an output other than {self._output}"
        try:
            found = [json.loads(line) for line in lines]
            settings = found[0]["settings"] if found else self._settings
            rows = [(line["key"], line["row"]) for line in found[1:]]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.path}: not a partial output of mc generate: {advice}"
            ) from error
        for key in sorted(settings.keys() | self._settings.keys()):
            old, new = settings.get(key), self._settings.get(key)
            if old != new:
                shown = f": {key} was {_short(old)} and is {_short(new)}"
                raise UserError(f"{self.path}: has rows of other settings{shown}: {advice}")
        if len(rows) > len(self._keys):
            count = f"{len(rows)} rows for {len(self._keys)} prompts"
            raise UserError(f"{self.path}: has {count}: {advice}")
        for number, ((key, row), wanted) in enumerate(zip(rows, self._keys, strict=False), 1):
            if key != wanted:
                raise UserError(f"{self.path}: row {number} is of another prompt: {advice}")
            self.rows.append(row)


def _short(value: Any) -> str:
    """Return a value as text for a message; hashes are truncated."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:13]}...{text[-1]}"
