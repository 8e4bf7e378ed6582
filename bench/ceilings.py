"""Roofline of the machine, measured with a large matrix product and a large copy."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bench.timing import alternate

COPIED = 1 << 26  # elements on a CPU: 256 MiB of float32, larger than the caches
COPIED_BY_ACCELERATOR = 1 << 30  # large enough to hide the launch overhead


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of XLA on the default device, the best of several runs."""

    matmul: float  # floating-point operations per second
    copy: float  # bytes per second, read and written

    def of(self, devices: int) -> "Ceilings":
        """Return the rates of `count` devices; CPU devices share cores and memory, so theirs are
        those of one.
        """
        if jax.default_backend() == "cpu":
            return self
        rates = {name: devices * rate for name, rate in vars(self).items()}
        return dataclasses.replace(self, **rates)

    def share(self, flops: float, seconds: float) -> float:
        """Return the share of the peak matmul rate."""
        return flops / seconds / self.matmul


def matrix_size() -> int:
    """Return the size of the timed square matrices, large enough to use the whole device."""
    return 2048 if jax.default_backend() == "cpu" else 8192


def measure(dtype: str = "float32", runs: int = 10) -> Ceilings:
    """Measure both rates in alternating runs.

    Args:
        dtype: dtype of both operations.
        runs: number of timed runs of each operation.
    """
    on_cpu = jax.default_backend() == "cpu"
    left = jax.random.normal(jax.random.key(0), (matrix_size(), matrix_size())).astype(dtype)
    numbers = jnp.ones(COPIED if on_cpu else COPIED_BY_ACCELERATOR, dtype)
    multiply = jax.jit(lambda x: x @ x).lower(left).compile()
    copy = jax.jit(lambda x: x + 1).lower(numbers).compile()
    times = alternate(
        {
            "matmul": lambda: jax.block_until_ready(multiply(left)),
            "copy": lambda: jax.block_until_ready(copy(numbers)),
        },
        runs,
    )
    return Ceilings(
        matmul=2.0 * matrix_size() ** 3 / min(times["matmul"].seconds),
        copy=2.0 * numbers.nbytes / min(times["copy"].seconds),
    )
