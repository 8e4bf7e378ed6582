"""One table of every parameter's name and layout in both frameworks; NumPy only.

`mc_jax` and `mc_torch` name and lay out a parameter alike, except that the two axes of a `kernel`
in the one are swapped in the `weight` of the other.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mc_core.memories import MEMORIES

Flat = dict[str, np.ndarray]  # names joined by "."; bfloat16 as `ml_dtypes.bfloat16`
Transform = Callable[[np.ndarray], np.ndarray]


def same(x: np.ndarray) -> np.ndarray:
    """Return the array as it is."""
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """Swap the two axes: [in, out] and [out, in], [width, features] and [features, width]."""
    # safetensors writes an array's memory as it lies, whatever the strides say.
    return np.ascontiguousarray(x.T)


class Row(NamedTuple):
    """One parameter; `#` in a name stands for an index."""

    jax: str  # path of the NNX attribute
    torch: str  # key of the state_dict
    transform: Transform  # its own inverse
    rank: int


def _product(name: str) -> Row:
    return Row(f"{name}.kernel", f"{name}.weight", transpose, 2)


def _alike(name: str, rank: int) -> Row:
    return Row(name, name, same, rank)


def layer_rows() -> tuple[Row, ...]:
    """Return the rows of a layer's parameters, coefficients of registered memories included."""
    coefficients = sorted({name for memory in MEMORIES.values() for name in memory.ranges})
    return (
        *(_product(f"{name}_proj") for name in ("q", "k", "v", "u", "out")),
        *(_product(f"{name}_conv") for name in "qkv"),
        *(_product(f"coefficients.{name}") for name in coefficients),
        *(_alike(f"coefficients.{name}.bias", 1) for name in coefficients),
        _alike("initial.#", 3),
        _alike("memory_norm.scale", 2),
        _alike("memory_norm.bias", 2),
        _alike("output_norm.scale", 2),
    )


def table() -> tuple[Row, ...]:
    """Return the rows of all parameters, of a lone layer and of a model."""
    layer = layer_rows()
    return (
        *layer,
        Row("embed.embedding", "embed.weight", same, 2),
        *(
            row._replace(jax=f"blocks.#.mixer.{row.jax}", torch=f"blocks.#.mixer.{row.torch}")
            for row in layer
        ),
        _alike("blocks.#.mixer_norm.scale", 1),
        _alike("blocks.#.ffn_norm.scale", 1),
        *(_product(f"blocks.#.ffn.{name}_proj") for name in ("gate", "up", "down")),
        _alike("norm.scale", 1),
        _product("head"),
    )


def by_jax_name() -> dict[str, Row]:
    """Return the table under its names in JAX."""
    return {row.jax: row for row in table()}


def by_torch_name() -> dict[str, Row]:
    """Return the table under its names in PyTorch."""
    return {row.torch: row for row in table()}


_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Leaf(NamedTuple):
    """What a parameter is, apart from its values."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def leaves(arrays: Mapping[str, Any]) -> dict[str, Leaf]:
    """Describe arrays of NumPy, JAX or PyTorch."""
    return {
        name: Leaf(tuple(array.shape), str(array.dtype).removeprefix("torch."))
        for name, array in arrays.items()
    }


def in_table(name: str) -> bool:
    """Whether PyTorch has a parameter of this name, in a layer or a model of any configuration."""
    return _INDEX.sub("#", name) in by_torch_name()


def to_torch(flat: Mapping[str, np.ndarray]) -> Flat:
    """Rename and lay out JAX parameters as PyTorch has them.

    Raises:
        ValueError: lists every name and rank that the table does not have.
    """
    return _translate(flat, by_jax_name(), lambda row: row.torch)


def to_jax(flat: Mapping[str, np.ndarray]) -> Flat:
    """Rename and lay out PyTorch parameters as JAX has them.

    Raises:
        ValueError: lists every name and rank that the table does not have.
    """
    return _translate(flat, by_torch_name(), lambda row: row.jax)


def check_leaves(
    given: Mapping[str, Leaf], wanted: Mapping[str, Leaf], what: str = "weights"
) -> None:
    """Hold parameters, or `what` they are, to a module's: every name once, its shape and dtype.

    Raises:
        ValueError: lists all that is missing, unexpected, or of another shape or dtype.
    """
    both = [name for name in wanted if name in given]
    faults = {
        "missing": [f"{name} {wanted[name]}" for name in wanted if name not in given],
        "unexpected": [f"{name} {given[name]}" for name in given if name not in wanted],
        "must be": [
            f"{name} {wanted[name]}, is {given[name]}"
            for name in both
            if given[name] != wanted[name]
        ],
    }
    _raise((f"{kind} {fault}" for kind, found in faults.items() for fault in found), what)


def _translate(
    flat: Mapping[str, np.ndarray], rows: Mapping[str, Row], rename: Callable[[Row], str]
) -> Flat:
    out: Flat = {}
    faults = []
    for (name, leaf), array in zip(leaves(flat).items(), flat.values(), strict=True):
        row = rows.get(_INDEX.sub("#", name))
        if row is None:
            faults.append(f"unexpected {name} {leaf}")
        elif array.ndim != row.rank:
            faults.append(f"must have {row.rank} axes: {name} {leaf}")
        else:
            target = rename(row).replace("#", "{}").format(*_INDEX.findall(name))
            out[target] = row.transform(array)
    _raise(faults)
    return out


def _raise(faults: Iterable[str], what: str = "weights") -> None:
    if listed := list(faults):
        raise ValueError(f"{what} do not fit:\n  " + "\n  ".join(listed))
