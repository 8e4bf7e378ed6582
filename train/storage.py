"""Errors of writing checkpoints: of disk space, and of Orbax's background threads."""

import gc
import logging
import os
import sys
import tempfile
import threading
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

_REASONS = (
    "No space left on device",
    "File too large",
    "Permission denied",
    "Disk quota exceeded",
)


class BackgroundErrors(logging.Filter):
    """Collects the errors that Orbax's background threads log, in place of their tracebacks.

    Tracebacks of TensorStore's threads are dropped: after a failed write, they report their other
    writes to an event loop that Orbax has closed. So are Python's warnings about writes that Orbax
    never started.

    Of several processes, one whose write fails would otherwise learn of it from Orbax only after
    the timeout of a barrier, which the others never reach.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []
        self._log = logging.getLogger("absl")
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Self:
        self._log.addFilter(self)
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._log.removeFilter(self)
        if self.found:
            # Threads may still report writes of a failed checkpoint, so the hook stays.
            self._free_writes()
        else:
            sys.unraisablehook = self._hook
        self._warnings.__exit__(kind, error, at)

    def _free_writes(self) -> None:
        """Free the writes that were never started while warnings about them are ignored."""
        for error in self.found:
            chain: BaseException | None = error
            while chain:
                traceback.clear_frames(chain.__traceback__)
                chain = chain.__context__
        gc.collect()

    def _report(self, unraisable: Any) -> None:
        in_background = threading.current_thread() is not threading.main_thread()
        if not (in_background and str(unraisable.exc_value) == "Event loop is closed"):
            self._hook(unraisable)

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop a record of an error in Orbax, and store the error."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if error is None or "orbax" not in Path(record.pathname).parts:
            return True
        if isinstance(error, Exception):
            self.found.append(error)
        return False


def check_disk_space(directory: Path, state: Any) -> None:
    """Check that the disk has space for what this process writes of a checkpoint.

    Args:
        directory: directory of the checkpoints.
        state: arrays of the checkpoint.

    Raises:
        OSError: the disk is full.
    """
    shards = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards]
    arrays = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=directory) as file:
            # Orbax writes the arrays twice, then deletes one copy; 1 MiB for small files.
            os.posix_fallocate(file.fileno(), 0, 2 * arrays + 2**20)


def reason(error: BaseException) -> str:
    """Return a one-line summary of a storage error."""
    text = " ".join(str(error).split())
    return next((words for words in _REASONS if words.lower() in text.lower()), text[:160])
