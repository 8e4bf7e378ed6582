"""Metrics of a run: JSON lines and TensorBoard events."""

import io
import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mc_core.errors import UserError
from mc_core.files import write_atomic

FILE = "metrics.jsonl"


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics of a run, without an incomplete last line."""
    path = run / FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")
    return [json.loads(line) for line in lines]


class Curves:
    """Writer of metrics; drops rows after `step`, which an interrupted run wrote.

    TensorBoard events are rewritten from the rows, in this thread, because the writer thread of the
    library does not report a full disk.
    """

    def __init__(self, run: Path, step: int):
        self._path = run / FILE
        rows = [row for row in read_rows(run) if row["step"] <= step]
        write_atomic(self._path, "".join(map(_line, rows)).encode())
        board = run / "tensorboard"
        board.mkdir(exist_ok=True)
        for old in board.glob("*.tfevents.*"):
            old.unlink()
        self._file: IO[str] = self._path.open("a")
        self._events: Any = RecordWriter(str(board / f"events.out.tfevents.{time.time():.0f}"))
        self._event(file_version="brain.Event:2")
        for row in rows:
            self._add(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for file in (self._file, self._events):
            try:
                file.close()
            except OSError:
                # After an error, flushing the buffer fails again.
                if error is None:
                    raise

    def write(self, step: int, **values: float) -> None:
        """Append a row.

        Raises:
            UserError: the row cannot be written.
        """
        row = {"step": step, "time": time.time(), **values}
        try:
            self._file.write(_line(row))
            self._file.flush()
            self._add(row)
            self._events.flush()
        except OSError as error:
            raise UserError(
                f"{self._path}: {error.strerror}: free disk space and run the same command; "
                "it resumes from the last checkpoint"
            ) from error

    def _add(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key not in ("step", "time"):
                self._event(step=row["step"], wall_time=row["time"], summary=scalar(key, value))

    def _event(self, **fields: Any) -> None:
        self._events.write(Event(**fields).SerializeToString())


class NoCurves(Curves):
    """Stands for `Curves` in a process that does not write them."""

    def __init__(self) -> None:
        self._file, self._events = io.StringIO(), io.BytesIO()

    def write(self, step: int, **values: float) -> None:
        """Drop a row."""


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
