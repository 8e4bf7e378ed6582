"""Named NumPy arrays of a run, in forward order."""

from collections.abc import Iterable
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np


class Leaf(NamedTuple):
    """One array of a run."""

    value: np.ndarray  # float64, or an integer or boolean type
    dtype: str  # dtype in the framework: "float32", "int32", ...


GRADIENT = "gradient"  # prefix of the names of gradients

Leaves = dict[str, Leaf]  # in forward order


def stack(runs: Iterable[Leaves]) -> Leaves:
    """Stack the leaves of several runs of a case, to compare them together.

    Leaves that are missing or differ in shape or dtype in some run are those of the first run.
    """
    first, *others = runs
    joined = {}
    for name, leaf in first.items():
        same = [run[name] for run in others if name in run and _same_format(run[name], leaf)]
        values = [leaf.value, *(one.value for one in same)]
        joined[name] = leaf if len(same) < len(others) else Leaf(np.stack(values), leaf.dtype)
    return joined


def _same_format(one: Leaf, other: Leaf) -> bool:
    return one.dtype == other.dtype and one.value.shape == other.value.shape


def cotangent(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw the random cotangent of a leaf, determined by name, shape and seed."""
    return np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)


class Forward(NamedTuple):
    """Results of a forward pass, in forward order; None if not available.

    All results except the trace of a model get cotangents.
    """

    cache: Any  # of functions, layers and streams
    trace: Any  # of layers, and of each block of a model
    gates: Any  # of functions and layers; of streams, of functions
    output: Any
