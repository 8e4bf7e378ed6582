"""Comparable timings: alternating runs after warm-up, without compile time."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SHORT_RUN_S = 1.0  # seconds; faster subjects have an untimed run before each timed one
WARM_CACHE_NOTE = (
    f"subjects that take less than {SHORT_RUN_S:g} s run twice per turn; the second run is timed, "
    "with data in the CPU caches, as in a training step"
)


@dataclass(frozen=True)
class Subject:
    """A function to be timed.

    Attributes:
        name: name in tables.
        run: executes the function once, waits for the result and returns it.
        tokens: number of tokens processed per run.
        compile_s: seconds of tracing and compilation; None if there is no compilation.
        compile_processor_s: the same in processor time, summed over threads.
        flops: FLOPs of a run, as counted by `count_flops` or by torch.
        bytes: peak bytes of a run, including arguments and results, summed over devices.
        devices: number of devices over which the batch is split.
        dtype: compute dtype.
    """

    name: str
    run: Callable[[], Any]
    tokens: int
    compile_s: float | None = None
    compile_processor_s: float | None = None
    flops: float | None = None
    bytes: int | None = None
    devices: int = 1
    dtype: str = "float32"


@dataclass(frozen=True)
class Timing:
    """Timed runs of a subject, in order.

    Other work on the machine changes wall-clock time but not processor time.
    """

    seconds: tuple[float, ...] = field(repr=False)  # wall-clock time
    processor: tuple[float, ...] = field(
        repr=False
    )  # processor time, summed over the threads of this process

    @property
    def median(self) -> float:
        """Median wall-clock time, in seconds."""
        return statistics.median(self.seconds)

    @property
    def processor_median(self) -> float:
        """Median processor time, in seconds."""
        return statistics.median(self.processor)

    @property
    def spread(self) -> float:
        """Half the interquartile range, divided by the median."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def alternate(
    subjects: Mapping[str, Callable[[], Any]], runs: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Time subjects in alternating runs, so that other load affects all of them equally.

    A subject whose last warm-up run took less than `SHORT_RUN_S` seconds has an untimed run before
    each timed one, because the CPU caches contain the data of the other subjects. For longer runs,
    this effect is negligible.

    Args:
        subjects: functions by name, which run once and wait for the result.
        runs: number of timed runs per subject.
        warmup: number of untimed runs per subject; with 0, all runs are timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    processor: dict[str, list[float]] = {name: [] for name in subjects}
    quick: set[str] = set()
    for turn in range(warmup + runs):
        for name, run in subjects.items():
            gc.collect()
            if turn >= warmup and name in quick:
                run()
            start = time.perf_counter(), time.process_time()
            run()
            end = time.perf_counter(), time.process_time()
            if turn >= warmup:
                seconds[name].append(end[0] - start[0])
                processor[name].append(end[1] - start[1])
            elif turn == warmup - 1 and end[0] - start[0] < SHORT_RUN_S:
                quick.add(name)
    return {name: Timing(tuple(seconds[name]), tuple(processor[name])) for name in subjects}


def ratio(of: Timing, to: Timing) -> tuple[float, float]:
    """Return the ratios of wall-clock time and of processor time of two subjects.

    Each is the median of the ratios per turn. The runs of a turn are consecutive, so the load of
    the machine cancels.
    """
    return (
        statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True)),
        statistics.median(a / b for a, b in zip(of.processor, to.processor, strict=True)),
    )
