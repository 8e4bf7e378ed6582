"""Batches on the device, read ahead of the training step."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import jax  # import before grain: without jax, grain only logs a warning

# isort: split
import grain

Item = tuple[Any, dict[str, Any]] | BaseException  # batch and position after it, or an error

DEPTH = 2  # batches on the device that no step has read yet


class Prefetch:
    """Iterator that reads batches in a thread, and places them on the device.

    Its position is that of the batches it has returned, so a checkpoint resumes with the next one.

    Args:
        batches: batches on the host, an infinite iterator that only the thread may use from now on.
        place: places a batch on the device.
    """

    def __init__(self, batches: grain.DatasetIterator, place: Callable[[Any], Any]):
        self._batches, self._place = batches, place
        self._position = batches.get_state()
        self._ready: queue.Queue[Item] = queue.Queue(DEPTH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._waited = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def __next__(self) -> Any:
        start = time.monotonic()
        item = self._ready.get()
        self._waited += time.monotonic() - start
        if isinstance(item, BaseException):
            raise item
        batch, self._position = item
        return batch

    def take_waited(self) -> float:
        """Return the seconds that `next` has waited for batches since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last returned batch."""
        return self._position

    def _read(self) -> None:
        try:
            while not self._stopped.is_set():
                batch = next(self._batches)
                self._put((self._place(batch), self._batches.get_state()))
        except BaseException as error:
            self._put(error)

    def _put(self, item: Item) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return


class InFlight:
    """Limits the number of steps that the host is ahead of the device.

    The device always has a next step to start, and the batches of few steps are in its memory.
    """

    def __init__(self) -> None:
        self._results: list[jax.Array] = []

    def add(self, result: jax.Array) -> None:
        """Wait for the step before the last one, given a result of the step just dispatched."""
        self._results.append(result)
        if len(self._results) > DEPTH:
            jax.block_until_ready(self._results.pop(0))
