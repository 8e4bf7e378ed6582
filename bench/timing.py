"""Timings that can be compared: whole runs, alternating, after warm-up; compile time apart."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

QUICK = 1.0  # seconds: a subject that takes less has an untimed run before each timed one
STEADY = (
    f"a subject that takes less than {QUICK:g} s runs twice a turn, and the second run is timed: "
    "it finds its own data in the cores' caches, as a training step does"
)


@dataclass(frozen=True)
class Subject:
    """Something that can be timed.

    Attributes:
        name: what a table calls it.
        run: does the work once, waits for it, and returns what it made.
        tokens: tokens that a run works on.
        compile_s: seconds of tracing and compilation, before the first run; None if there is none.
        compile_processor_s: the same in processor time, summed over threads.
        flops: operations of a run as the compiler or an operation counter counts them.
        bytes: the most bytes that a run holds at once, arguments and results included, on all of
            its devices together.
        devices: over how many the batch is split.
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

    On a machine that has other work a wall clock measures that work, too; processor time does not.
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
        """Half the distance of the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def alternate(
    subjects: Mapping[str, Callable[[], Any]], runs: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Time subjects in turn, so that whatever else the machine does falls on all alike.

    A timed run is a steady one. A subject whose last warm-up run took less than `QUICK` seconds
    runs once untimed in each turn before it is timed: else it would begin with the others' data in
    the cores' caches. Longer runs fill them themselves, at no cost that shows.

    Args:
        subjects: name -> a function that does the work once and waits for it.
        runs: timed runs of each.
        warmup: runs of each before that, which do not count; without any, all is timed at once.
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
    """Return how many times `of` takes as long as `to`: by the wall clock, and in processor time.

    Each is the median over the turns' own ratios: a turn's runs follow each other, so a change of
    the machine's load falls out of their ratio.
    """
    return (
        statistics.median(a / b for a, b in zip(of.seconds, to.seconds, strict=True)),
        statistics.median(a / b for a, b in zip(of.processor, to.processor, strict=True)),
    )
