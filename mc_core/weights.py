"""Names and layouts of all parameters in both frameworks.

`mc_jax` and `mc_torch` use the same names and layouts, except for matrices: `kernel` [in, out] in
JAX is `weight` [out, in] in PyTorch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mc_core.memories import MEMORIES

Flat = dict[str, np.ndarray]  # names joined by "."; bfloat16 as `ml_dtypes.bfloat16`
Transform = Callable[[np.ndarray], np.ndarray]


def identity(x: np.ndarray) -> np.ndarray:
    """Return the array unchanged."""
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """Swap the two axes: [in, out] and [out, in], [width, features] and [features, width]."""
    # safetensors ignores the strides of arrays.
    return np.ascontiguousarray(x.T)


class ParameterNames(NamedTuple):
    """Names and layout of a parameter; `#` in a name stands for an index."""

    jax: str  # path of the NNX attribute
    torch: str  # key of the state_dict
    transform: Transform  # from JAX to PyTorch, and its own inverse
    rank: int


def _linear(name: str) -> ParameterNames:
    return ParameterNames(f"{name}.kernel", f"{name}.weight", transpose, 2)


def _same_layout(name: str, rank: int) -> ParameterNames:
    return ParameterNames(name, name, identity, rank)


def layer_rows() -> tuple[ParameterNames, ...]:
    """Return the parameters of a layer, including coefficients of registered memories."""
    coefficients = sorted({name for memory in MEMORIES.values() for name in memory.ranges})
    return (
        *(_linear(f"{name}_proj") for name in ("q", "k", "v", "u", "out")),
        *(_linear(f"{name}_conv") for name in "qkv"),
        *(_linear(f"coefficients.{name}") for name in coefficients),
        *(_same_layout(f"coefficients.{name}.bias", 1) for name in coefficients),
        _same_layout("gate_bias", 1),
        _same_layout("gate_temperature", 1),
        _same_layout("initial.#", 3),
        _linear("level_proj"),
        _same_layout("level_scale", 2),
        _same_layout("memory_norm.scale", 2),
        _same_layout("memory_norm.bias", 2),
        _same_layout("output_norm.scale", 2),
    )


def table() -> tuple[ParameterNames, ...]:
    """Return all parameters, of a single layer and of a model."""
    layer = layer_rows()
    return (
        *layer,
        ParameterNames("embed.embedding", "embed.weight", identity, 2),
        *(
            row._replace(jax=f"blocks.#.mixer.{row.jax}", torch=f"blocks.#.mixer.{row.torch}")
            for row in layer
        ),
        _same_layout("blocks.#.mixer_norm.scale", 1),
        _same_layout("blocks.#.ffn_norm.scale", 1),
        *(_linear(f"blocks.#.ffn.{name}_proj") for name in ("gate", "up", "down")),
        _same_layout("norm.scale", 1),
        _linear("head"),
    )


def by_jax_name() -> dict[str, ParameterNames]:
    """Return the table, keyed by JAX name."""
    return {row.jax: row for row in table()}


def by_torch_name() -> dict[str, ParameterNames]:
    """Return the table, keyed by PyTorch name."""
    return {row.torch: row for row in table()}


_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


class ArraySpec(NamedTuple):
    """Shape and dtype of an array."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def leaves(arrays: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Return shape and dtype of NumPy, JAX or PyTorch arrays."""
    return {
        name: ArraySpec(tuple(array.shape), str(array.dtype).removeprefix("torch."))
        for name, array in arrays.items()
    }


def in_table(name: str) -> bool:
    """Return True if a layer or model can have a PyTorch parameter with this name."""
    return _INDEX.sub("#", name) in by_torch_name()


def to_torch(flat: Mapping[str, np.ndarray]) -> Flat:
    """Convert JAX parameters to the names and layouts of PyTorch.

    Raises:
        ValueError: a name is unknown or a rank is wrong; the message lists all mismatches.
    """
    return _convert(flat, by_jax_name(), lambda row: row.torch)


def to_jax(flat: Mapping[str, np.ndarray]) -> Flat:
    """Convert PyTorch parameters to the names and layouts of JAX.

    Raises:
        ValueError: a name is unknown or a rank is wrong; the message lists all mismatches.
    """
    return _convert(flat, by_torch_name(), lambda row: row.jax)


def check_leaves(
    actual: Mapping[str, ArraySpec], expected: Mapping[str, ArraySpec], what: str = "weights"
) -> None:
    """Check names, shapes and dtypes of arrays against the expected ones.

    Args:
        actual: the arrays.
        expected: the expected arrays.
        what: name of the arrays for the error message.

    Raises:
        ValueError: an array is missing, unexpected, or of another shape or dtype; the message lists
            all mismatches.
    """
    common = [name for name in expected if name in actual]
    mismatches = {
        "missing": [f"{name} {expected[name]}" for name in expected if name not in actual],
        "unexpected": [f"{name} {actual[name]}" for name in actual if name not in expected],
        "must be": [
            f"{name} {expected[name]}, is {actual[name]}"
            for name in common
            if actual[name] != expected[name]
        ],
    }
    _raise_mismatches(
        (f"{kind} {entry}" for kind, entries in mismatches.items() for entry in entries), what
    )


def _convert(
    flat: Mapping[str, np.ndarray],
    rows: Mapping[str, ParameterNames],
    rename: Callable[[ParameterNames], str],
) -> Flat:
    out: Flat = {}
    mismatches = []
    for (name, leaf), array in zip(leaves(flat).items(), flat.values(), strict=True):
        row = rows.get(_INDEX.sub("#", name))
        if row is None:
            mismatches.append(f"unexpected {name} {leaf}")
        elif array.ndim != row.rank:
            mismatches.append(f"must have {row.rank} axes: {name} {leaf}")
        else:
            target = rename(row).replace("#", "{}").format(*_INDEX.findall(name))
            out[target] = row.transform(array)
    _raise_mismatches(mismatches)
    return out


def _raise_mismatches(mismatches: Iterable[str], what: str = "weights") -> None:
    if listed := list(mismatches):
        raise ValueError(f"{what} do not match:\n  " + "\n  ".join(listed))
