"""Named arrays: what a run gives, flattened in forward order, in NumPy, whatever framework ran."""

from typing import Any, NamedTuple
from zlib import crc32

import numpy as np


class Leaf(NamedTuple):
    """One array of a run."""

    value: np.ndarray  # float64, or an integer or boolean type
    dtype: str  # as the framework computed it: "float32", "int32", ...


GRADIENT = "gradient"  # what the names of gradients begin with

Leaves = dict[str, Leaf]  # in forward order


def cotangent(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw the random cotangent of a leaf: the same for both frameworks, another for each name."""
    return np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)


class Forward(NamedTuple):
    """What a forward pass gives, in the order in which it comes about; None where it does not.

    Gradients are taken of all but a model's trace.
    """

    cache: Any  # of functions, layers and streams
    trace: Any  # of layers, and of each block of a model
    gates: Any  # of functions and layers; of streams, of functions
    output: Any
