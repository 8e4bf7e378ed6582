"""Comparable timings: whole runs, alternating, after warm-up; compile time is separate."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

QUICK = 1.0  # seconds: a subject that takes less has an untimed run before each timed one
STEADY = (
    f"a subject that takes less than {QUICK:g} s runs twice per turn, and the second run is timed: "
    "its data are in the cores' caches, as in a training step"
)


@dataclass(frozen=True)
class Subject:
    """Something that can be timed.

    Attributes:
        name: in tables.
        run: does the work once, waits for it, and returns its result.
        tokens: tokens that a run works on.
        compile_s: seconds of tracing and compilation, before the first run; None if there is none.
        compile_processor_s: the same in processor time, summed over threads.
        flops: operations of a run as the compiler or an operation counter counts them.
        bytes: peak bytes of a run, including arguments and results, summed over its devices.
        devices: number of devices over which the batch is split.
        dtype: of the computation.
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
    """The steady runs of a subject, in the order in which they were made.

    Other work on the machine changes wall-clock time but not processor time.
    """

    seconds: tuple[float, ...] = field(repr=False)  # of the wall clock
    processor: tuple[float, ...] = field(repr=False)  # summed over this process's threads

    @property
    def median(self) -> float:
        """The median run, in seconds of the wall clock."""
        return statistics.median(self.seconds)

    @property
    def processor_median(self) -> float:
        """The median run, in seconds of processor time."""
        return statistics.median(self.processor)

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def alternate(
    subjects: Mapping[str, Callable[[], Any]], runs: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Time subjects alternately, so that other work on the machine affects all alike.

    A timed run is a steady one. A subject whose last warm-up run took less than `QUICK` seconds
    runs once untimed in each turn before it is timed: otherwise the cores' caches would hold data
    of the other subjects. For longer runs the effect is negligible.

    Args:
        subjects: name -> a function that does the work once and waits for it.
        runs: timed runs of each.
        warmup: untimed runs of each before; with 0, all runs are timed.
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
            elif turn == warmup - 1 and end[0] - start[0] < QUICK:
                quick.add(name)
    return {name: Timing(tuple(seconds[name]), tuple(processor[name])) for name in subjects}


def ratio(of: Timing, to: Timing) -> tuple[float, float]:
    """Return the ratio of the times of `of` and `to`: wall-clock and processor time.

    Each is the median of the ratios per turn: a turn's runs are consecutive, so the machine's load
    cancels.
    """
    return (
        statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True)),
        statistics.median(a / b for a, b in zip(of.processor, to.processor, strict=True)),
    )
