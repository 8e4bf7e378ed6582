"""Order of the runs of a sweep, and selection of learning rates."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from train.lock import Lock, LockedError
from train.sweeps.results import Key, Results, RunResult, best, key_of
from train.sweeps.sweep_config import Run, SweepConfig, make_run


class SweepPlan:
    """Queue of the runs of a sweep: first every rate with the first seed, then the best rate with
    the other seeds.

    The directory of a run is locked from `take` until its result is added or the context exits. If
    two sweeps share a directory, one executes the run, and the other reads its result.

    Args:
        config: configuration of the sweep.
        first: for each row, the runs of all rates with the first seed.
        results: existing results.

    Attributes:
        blocked: error from the last `take` about a run that another process has locked, or None.
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
    def has_pending(self) -> bool:
        """True if a known run has no result yet."""
        return any(self._results.find(run) is None for run in self._known())

    def take(self) -> Run | None:
        """Lock and return the first run without a result that no process has locked, or None."""
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
        """Append the result of a run from `take`, and unlock the run.

        Raises:
            OSError: the result cannot be written.
        """
        self._results.add(result)
        self._locks.pop(key_of(result)).close()

    def progress(self) -> str:
        """Return `finished/total`, the numbers of finished runs and of all runs."""
        done = sum(self._results.find(run) is not None for run in self._known())
        others = len(self._config.seeds) - 1
        return f"{done}/{sum(len(runs) + others for runs in self._first.values())}"

    def table(self) -> list[RunResult]:
        """Return the results in the table, in the order of the file; requires all results."""
        results = [self._results.find(run) for row in self._first for run in self._of_row(row)]
        return [result for result in results if result is not None]

    def _known(self) -> Iterator[Run]:
        """Yield the runs in file order; those of other seeds once the row's rate is known."""
        for row, runs in self._first.items():
            yield from runs
            if all(self._results.find(run) for run in runs):
                yield from self._of_row(row)[1:]

    def _of_row(self, row: str) -> list[Run]:
        """Return the runs at the best rate of a row; requires the results of all rates."""
        if row not in self._chosen:
            results = [result for run in self._first[row] if (result := self._results.find(run))]
            self._chosen[row] = runs_of_row(self._config, self._first[row], results)
        return self._chosen[row]


def runs_of_row(
    config: SweepConfig, runs: Sequence[Run], results: Sequence[RunResult]
) -> list[Run]:
    """Return the runs of a row at its best rate, one per seed.

    Args:
        config: configuration of the sweep.
        runs: runs of all rates with the first seed.
        results: results of these runs.
    """
    rate = best(results)["rate"]
    (winner,) = (run for run in runs if run.rate == rate)
    others = config.seeds[1:]
    return [winner, *(make_run(config, winner.row, winner.overrides, s, rate) for s in others)]
