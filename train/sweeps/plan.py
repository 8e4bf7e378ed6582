"""Order of a sweep's runs, and the choice of rates."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from train.lock import Lock, LockedError
from train.sweeps.results import Key, Results, RunResult, best, key_of
from train.sweeps.sweep_config import Run, SweepConfig, make_run


class SweepPlan:
    """The runs of a sweep: every rate of a row with the first seed, the best with the others.

    The directory of a run is locked from `take` until its result is added or the `with` ends: if
    two sweeps share a directory, one does the run, and the other reads its result.

    Args:
        config: the sweep.
        first: by row, a run of each rate with the first seed.
        results: the existing ones.

    Attributes:
        blocked: message about a run that another process has, from the last `take`, or None.
    """

    def __init__(self, config: SweepConfig, first: dict[str, list[Run]], results: Results):
        self._config, self._first, self._results = config, first, results
        self._chosen: dict[str, list[Run]] = {}
        self._locks: dict[Key, Lock] = {}
        self.blocked: LockedError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for lock in self._locks.values():
            lock.close()

    @property
    def left(self) -> bool:
        """True if a known run has no result yet."""
        return any(self._results.find(run) is None for run in self._known())

    def take(self) -> Run | None:
        """Return the first run without result that no process has locked, or None."""
        self._results.refresh()
        self.blocked = None
        for run in self._known():
            if run.key in self._locks or self._results.find(run) is not None:
                continue
            lock = Lock.of_run(Path(run.config.run.directory))
            try:
                lock.acquire()
            except LockedError as error:
                self.blocked = error
                continue
            # The previous owner of the lock may have added the result.
            self._results.refresh()
            if self._results.find(run) is None:
                self._locks[run.key] = lock
                return run
            lock.close()
        return None

    def add(self, result: RunResult) -> None:
        """Append the result of a taken run.

        Raises:
            OSError: it cannot be written.
        """
        self._results.add(result)
        self._locks.pop(key_of(result)).close()

    def progress(self) -> str:
        """Return the number of finished runs and of all runs."""
        done = sum(self._results.find(run) is not None for run in self._known())
        others = len(self._config.seeds) - 1
        return f"{done}/{sum(len(runs) + others for runs in self._first.values())}"

    def table(self) -> list[RunResult]:
        """Return the results of the table, in the order of the file, when all are complete."""
        found = [self._results.find(run) for row in self._first for run in self._of_row(row)]
        return [result for result in found if result is not None]

    def _known(self) -> Iterator[Run]:
        """Yield the runs in the order of the file; other seeds where the row's rate is known."""
        for row, runs in self._first.items():
            yield from runs
            if all(self._results.find(run) for run in runs):
                yield from self._of_row(row)[1:]

    def _of_row(self, row: str) -> list[Run]:
        """Return the runs of a row's figures; the results of all rates must exist."""
        if row not in self._chosen:
            found = [result for run in self._first[row] if (result := self._results.find(run))]
            self._chosen[row] = runs_of_row(self._config, self._first[row], found)
        return self._chosen[row]


def runs_of_row(
    config: SweepConfig, runs: Sequence[Run], results: Sequence[RunResult]
) -> list[Run]:
    """Return the runs of a row's figures: each seed at the best rate.

    Args:
        config: the sweep.
        runs: of each rate, with the first seed.
        results: of these runs.
    """
    rate = best(results)["rate"]
    (winner,) = (run for run in runs if run.rate == rate)
    others = config.seeds[1:]
    return [winner, *(make_run(config, winner.row, winner.overrides, s, rate) for s in others)]
