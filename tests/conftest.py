"""Settings of the whole test run; fixtures that hold our own code to stricter rules."""

import os
from collections.abc import Iterator

import pytest

from parity.environment import AS_WRITTEN, flags, quick_compile

# Almost all of the time goes into XLA's compiler, never into these tiny programs: without its
# optimisations a jitted gradient takes 1-2 s in place of 10.
os.environ["XLA_FLAGS"] = flags(AS_WRITTEN | quick_compile())

import jax

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(scope="module")
def float64() -> Iterator[None]:
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def strict() -> Iterator[None]:
    """Refuse implicit promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
