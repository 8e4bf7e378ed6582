"""What this machine can do at most: its own large product and its own copy, measured."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bench.timing import alternate

SIDE = 2048  # of the square matrices
COPIED = 1 << 26  # float32 numbers: 256 MiB, more than a cache holds


@dataclass(frozen=True)
class Ceilings:
    """Rates of XLA on the default device: the best of the runs, which other work slows least."""

    matmul: float  # floating-point operations a second
    copy: float  # bytes a second, read and written

    def of(self, devices: int) -> "Ceilings":
        """Return the rates of so many devices; those of a CPU have its cores and memory in common,
        and one large product or copy has all of them already.
        """
        if jax.default_backend() == "cpu":
            return self
        rates = {name: devices * rate for name, rate in vars(self).items()}
        return dataclasses.replace(self, **rates)

    def share(self, flops: float, seconds: float) -> float:
        """Return the share of the product's rate that so many operations in so long a time are."""
        return flops / seconds / self.matmul


def measure(dtype: str = "float32", runs: int = 10) -> Ceilings:
    """Measure both rates in one alternating run.

    Args:
        dtype: of the factors and of what is copied.
        runs: timed runs of each.
    """
    left = jnp.ones((SIDE, SIDE), dtype)
    numbers = jnp.ones(COPIED, jnp.float32).astype(dtype)
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
        matmul=2.0 * SIDE**3 / min(times["matmul"].seconds),
        copy=2.0 * numbers.nbytes / min(times["copy"].seconds),
    )
