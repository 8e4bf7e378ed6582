"""Use of the devices: MFU, memory, and traces of `jax.profiler`."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from mc_core.chips import find_chip
from mc_core.footprint import flops_per_token
from train.config import TextConfig, TrainConfig

TRACES = "tensorboard"  # folder of the traces in a run directory; that of the curves


def make_mfu(config: TrainConfig) -> Callable[[float], dict[str, float]]:
    """Return a function from tokens per second to the row of the MFU.

    The MFU is the share of the devices' peak FLOPs that a training step needs: three times those of
    the products of the forward pass, without recomputation. The row is empty if the peak is not
    known, and for recall tasks, which compute logits at few positions only.
    """
    chip = find_chip(jax.devices()[0].device_kind)
    peak = config.run.peak_flops or (chip.flops if chip else None)
    if peak is None or not isinstance(config.data, TextConfig):
        return lambda speed: {}
    needed = 3 * flops_per_token(config.model, config.data.window)
    available = peak * jax.device_count()
    return lambda speed: {"mfu": needed * speed / available}


def memory() -> dict[str, float]:
    """Return bytes in use now and at the peak, of the device that uses most.

    Empty if the backend does not report them, as on CPUs.
    """
    reports = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    return {
        row: float(max(report[name] for report in reports))
        for row, name in names.items()
        if all(name in report for report in reports)
    }


class Trace:
    """Trace of the steps `run.profile`, written to the run directory.

    Args:
        directory: run directory.
        steps: first and last step; None = no trace.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory = directory / TRACES
        self._first, self._last = steps or (0, 0)
        self._runs = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Start the trace if it begins with this step, or the run resumes within it."""
        if not self._runs and self._first <= step <= self._last:
            jax.profiler.start_trace(self._directory)
            self._runs = True

    def after(self, step: int, result: Any) -> None:
        """Write the trace if it ends with this step, of which `result` is an array."""
        if self._runs and step == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()
