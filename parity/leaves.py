"""Named arrays: what a run gives, flattened in forward order, in NumPy, whatever framework ran."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np


class Leaf(NamedTuple):
    """One array of a run."""

    value: np.ndarray  # float64, or an integer or boolean type
    dtype: str  # as the framework computed it: "float32", "int32", ...


GRADIENT = "gradient"  # what the names of gradients begin with

Leaves = dict[str, Leaf]  # in forward order


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(a.b.0.c, leaf)` of nested tuples, named tuples, lists and dictionaries, in order.

    None and empty tuples have no leaves.
    """
    if tree is None:
        return
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, tuple | list):
        names = getattr(tree, "_fields", range(len(tree)))
        items = list(zip(names, tree, strict=True))
    else:
        yield path, tree
        return
    for name, branch in items:
        yield from flatten(branch, f"{path}.{name}" if path else str(name))


def cotangent(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Draw the random cotangent of a leaf: the same for both frameworks, another for each name."""
    return np.random.default_rng([seed, crc32(name.encode())]).standard_normal(shape)


class Forward(NamedTuple):
    """What a forward pass gives, in the order in which it comes about; None where it does not.

    Gradients are taken of all but the trace.
    """

    cache: Any  # of functions, layers and streams
    trace: Any  # of models: a trace of each block
    gates: Any  # of functions and layers; of streams, of functions
    output: Any
