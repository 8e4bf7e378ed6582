"""Named arrays of a run in forward order, in NumPy for both frameworks."""

from collections.abc import Iterable
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np


class Leaf(NamedTuple):
    """One array of a run."""

    value: np.ndarray  # float64, or an integer or boolean type
    dtype: str  # as the framework computed it: "float32", "int32", ...


GRADIENT = "gradient"  # prefix of the names of gradients

Leaves = dict[str, Leaf]  # in forward order


def stack(runs: Iterable[Leaves]) -> Leaves:
    """Stack the leaves of runs that differ only in their numbers, to compare them as one.

    A leaf that some run lacks, or has in another shape or dtype, is that of the first run.
    """
    first, *others = runs
    joined = {}
    for name, leaf in first.items():
        same = [run[name] for run in others if name in run and _alike(run[name], leaf)]
        values = [leaf.value, *(one.value for one in same)]
        joined[name] = leaf if len(same) < len(others) else Leaf(np.stack(values), leaf.dtype)
    return joined


def _alike(one: Leaf, other: Leaf) -> bool:
    return one.dtype == other.dtype and one.value.shape == other.value.shape


def cotangent(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw the random cotangent of a leaf: the same in both frameworks, different for each name."""
    return np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)


class Forward(NamedTuple):
    """Results of a forward pass, in forward order; None where it has none.

    All but a model's trace get gradients.
    """

    cache: Any  # of functions, layers and streams
    trace: Any  # of layers, and of each block of a model
    gates: Any  # of functions and layers; of streams, of functions
    output: Any
