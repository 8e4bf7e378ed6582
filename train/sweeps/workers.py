"""Parallel execution of runs, in this process or in worker processes with their own cores.

This module must not import jax: a worker sets its cores before jax counts them.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from types import TracebackType
from typing import Any, Self

from mc_core.errors import UserError
from parity.environment import cores
from train.sweeps.results import RunResult
from train.sweeps.sweep_config import Run
from train.user_modules import import_from_environment

Work = Callable[[Run], RunResult]


def check_jobs(jobs: int) -> None:
    """Check that there are at least as many cores as jobs.

    Raises:
        UserError: `jobs` is less than 1, or more than the cores that this process may use.
    """
    if not 1 <= jobs <= len(cores()):
        raise UserError(f"jobs = {jobs}: must be in [1, {len(cores())}], the number of cores")


def shares(jobs: int) -> list[set[int]]:
    """Return the cores of each worker, a partition of all cores into contiguous ranges."""
    available = cores()
    ends = [len(available) * i // jobs for i in range(jobs + 1)]
    return [set(available[ends[i] : ends[i + 1]]) for i in range(jobs)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit XLA to one thread in this process and new processes, unless NPROC is set.

    On a CPU, the rounding of XLA depends on its number of threads, so results would depend on the
    number of jobs. Must be entered before the first computation of jax.
    """
    before = os.environ.get("NPROC")
    os.environ.setdefault("NPROC", "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ["NPROC"]


class Workers:
    """Executes runs: one at a time in this process, or in parallel in child processes.

    Child processes exit when the context exits or this process dies: each reads from a pipe of
    which only this process has the writing end.

    Args:
        jobs: number of parallel runs.
        work: function that executes a run.
        devices: number of CPU devices of JAX in each child process.
    """

    def __init__(self, jobs: int, work: Work, devices: int = 1):
        self._jobs, self._work = jobs, work
        self._running: dict[Future[RunResult], Run] = {}
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            core_shares = context.SimpleQueue()
            for share in shares(jobs):
                core_shares.put(share)
            self._end, self._parent_end = context.Pipe(duplex=False)
            arguments = (core_shares, self._end, devices)
            self._pool = ProcessPoolExecutor(jobs, context, _init_worker, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            if error is not None:
                self._parent_end.close()
            self._pool.shutdown(cancel_futures=True)
            self._parent_end.close()
            self._end.close()

    @property
    def busy(self) -> int:
        """Number of started runs without a received result."""
        return len(self._running)

    def start(self, run: Run) -> None:
        """Start a run; with one job, execute it."""
        if self._pool is None:
            future: Future[RunResult] = Future()
            future.set_result(self._work(run))
        else:
            with _no_interrupt():
                future = self._pool.submit(_execute, self._work, run)
        self._running[future] = run

    def results(self) -> Iterator[RunResult]:
        """Wait until a run finishes, yield all finished results, and raise errors.

        Raises:
            UserError: a run failed, or a worker died.
            OSError: a file could not be read or written.
        """
        wait(self._running, return_when=FIRST_COMPLETED)
        done = [future for future in self._running if future.done()]
        for future in done:
            if future.exception() is None:
                del self._running[future]
                yield future.result()
        for future in done:
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"jobs = {self._jobs}: a worker died, perhaps out of memory: "
                    "run the same command to resume, if necessary with fewer jobs"
                )
            if error is not None:
                raise error


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM; processes started meanwhile ignore Ctrl-C."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handlers: dict[int, Callable[..., Any]] = {}
    delayed: list[tuple[Any, ...]] = []
    # The signal may still be delivered to a thread that does not block it.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda *interrupt: delayed.append(interrupt))
    try:
        yield
    finally:
        for caught, handler in handlers.items():
            signal.signal(caught, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if delayed:
            handlers[delayed[0][0]](*delayed[0])


def _init_worker(core_shares: "SimpleQueue[set[int]]", end: Connection, devices: int) -> None:
    """Initialize a worker process: its cores and devices, and exit when its parent exits."""
    share = core_shares.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    # Otherwise the first worker preallocates all memory of a GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    threading.Thread(target=_end_with_parent, args=(end,), daemon=True).start()
    import_from_environment()
    if devices > 1:
        from mc_jax.sharding import request

        request(devices)


def _end_with_parent(end: Connection) -> None:
    try:
        end.recv()
    finally:
        os._exit(1)


def _execute(work: Work, run: Run) -> RunResult:
    try:
        return work(run)
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"{run.name}: {type(error).__name__}: {error}: use --jobs 1 for a traceback"
        ) from error
