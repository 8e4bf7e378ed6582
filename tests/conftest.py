"""Settings of the whole test run; fixtures that hold our own code to stricter rules."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from parity.environment import AS_WRITTEN, flags, quick_compile

# Almost all of the time goes into XLA's compiler, never into these tiny programs: without its
# optimisations a jitted gradient takes 1-2 s in place of 10.
os.environ["XLA_FLAGS"] = flags(AS_WRITTEN | quick_compile())

import jax

jax.config.update("jax_num_cpu_devices", 4)


_MAPS = Path("/proc/self/maps")
_tests = count(1)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Drop compiled programs before they use up the process's memory maps (Linux: 65,530)."""
    yield
    if next(_tests) % 16 == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


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
