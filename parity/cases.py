"""Test cases of the comparison, and their random inputs."""

import dataclasses
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mc_core import (
    MCConfig,
    ModelConfig,
)

Array = np.ndarray

LEVELS = ("function", "layer", "model")
METHODS = ("chunked", "recurrent")
MASKS = ("none", "some", "padded", "segment", "row")
DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One computation that both frameworks run on the same inputs.

    Attributes:
        config: configuration of the layer, or of the model if `level="model"`.
        level: `function` (`memory_caching`), `layer` or `model`.
        method: one of `METHODS`, for the function; layers and models use `chunked`.
        tokens: length of the sequences.
        batch: number of sequences.
        mask: one of `MASKS`.
        lengths: explicit segment lengths, for the function.
        splits: number of tokens of each streaming call; None = one full pass.
        padding: the streams of a layer or model contain padding.
        dtype: float64, float32, or bfloat16 (bfloat16 compute with float32 parameters).
        ties: all segments have the same keys, so the gates' scores are equal.
        drawn: use random parameters; otherwise, those of the given weights or the default
            initialization.
        new_tokens: tokens to generate greedily; 0 for none.
        seed: random seed of inputs, parameters and cotangents.
    """

    config: MCConfig | ModelConfig
    level: str = "function"
    method: str = "chunked"
    tokens: int = 13
    batch: int = 2
    mask: str = "none"
    lengths: tuple[int, ...] | None = None
    splits: tuple[int, ...] | None = None
    padding: bool = False
    dtype: str = "float64"
    ties: bool = False
    drawn: bool = True
    new_tokens: int = 0
    seed: int = 0

    @property
    def layer(self) -> MCConfig:
        """The configuration of the memory layer."""
        return self.config.layer if isinstance(self.config, ModelConfig) else self.config

    @property
    def name(self) -> str:
        """Name of the case: kind, aggregation, and all fields with non-default values."""
        layer = self.layer
        words = [f"{layer.memory.kind}+{layer.aggregation}"]
        words.append(self.method if self.level == "function" else self.level)
        words += [f"greedy={self.new_tokens}"] * (self.new_tokens > 0)
        words += [layer.state_init_mode] * (layer.state_init_mode == "restart")
        cut = "explicit" if self.lengths else layer.segmentation
        words += [cut] * (cut != "constant") + ["ties"] * self.ties
        words += ["+".join(map(str, self.splits))] if self.splits else []
        words += ["padding"] * self.padding
        words += [f"mask={self.mask}"] * (self.mask != "none")
        words += _non_default(layer.memory) + _non_default(layer, _NAMED_FIELDS)
        if isinstance(self.config, ModelConfig):
            words += _non_default(self.config, _NAMED_IN_MODEL)
        return " ".join((*words, f"t={self.tokens}"))

    @property
    def calls(self) -> tuple[slice, ...]:
        """Token slice of each streaming call."""
        ends = tuple(accumulate(self.splits or ()))
        return tuple(slice(*call) for call in pairwise((0, *ends)))

    def where(self, **fields: Any) -> "Case":
        """Return a copy with other values of some fields."""
        return dataclasses.replace(self, **fields)


# Fields of a layer that `Case.name` formats separately, or that are constant in a grid.
_NAMED_FIELDS = (
    "d_model",
    "num_heads",
    "memory",
    "aggregation",
    "segmentation",
    "segment_size",
    "chunk_size",
    "state_init_mode",
)
_NAMED_IN_MODEL = ("vocab_size", "layer", "ffn_width", "attention_window")


def _non_default(config: Any, known: tuple[str, ...] = ()) -> list[str]:
    """Return `field=value` for the fields with non-default values."""
    return [
        f"{field.name}={'+'.join(value) if isinstance(value, tuple) else value}"
        for field in dataclasses.fields(config)
        if field.name not in known and (value := getattr(config, field.name)) != field.default
    ]


class FunctionInputs(NamedTuple):
    """The differentiable inputs of `memory_caching`."""

    q: Any  # [b, t, h, k], also k and u
    k: Any
    v: Any  # [b, t, h, v]
    u: Any
    initial: tuple[Any, ...]  # each [h, out, in]
    coefficients: dict[str, Any]  # each [b, t, h]
    norm: tuple[Any, Any] | None  # each [h, v]
    gate_bias: Any = None  # [h]

    def at(self, tokens: slice) -> "FunctionInputs":
        """Return the inputs of a slice of tokens."""
        q, k, v, u = (None if x is None else x[:, tokens] for x in self[:4])
        coefficients = {name: x[:, tokens] for name, x in self.coefficients.items()}
        return self._replace(q=q, k=k, v=v, u=u, coefficients=coefficients)


class Inputs(NamedTuple):
    """Inputs of a case, in float64."""

    differentiable: FunctionInputs | dict[str, Array]
    tokens: Array | None  # token ids [b, t], for a model
    mask: Array | None  # bool [b, t]
    padding: Array | None = None  # bool [b, t], True at padding

    @property
    def prompts(self) -> list[Array]:
        """Token ids of each row, without padding."""
        assert self.tokens is not None
        padding = np.zeros(self.tokens.shape, bool) if self.padding is None else self.padding
        return [row[~pad] for row, pad in zip(self.tokens, padding, strict=True)]


def draw(case: Case) -> Inputs:
    """Draw the inputs of a case, with the magnitudes of a trained layer.

    All values are representable in the case's dtype, so a float64 run gets the same inputs.
    """
    rng = np.random.default_rng(case.seed)
    mask = _mask(case, rng)
    shape = (case.batch, case.tokens)
    padding = np.random.default_rng([case.seed, 2]).random(shape) < 0.3 if case.padding else None
    if isinstance(case.config, ModelConfig):
        return Inputs({}, rng.integers(case.config.vocab_size, size=shape), mask, padding)
    if case.level == "layer":
        x = rounded(rng.standard_normal((*shape, case.config.d_model)), case.dtype)
        return Inputs({"x": x}, None, mask, padding)
    return Inputs(_function_inputs(case, case.config, rng), None, mask)


def rounded(x: Any, dtype: str) -> Any:
    """Round arrays in nested tuples and dictionaries to a dtype, and return them as float64."""
    if isinstance(x, dict):
        return {name: rounded(value, dtype) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(rounded(value, dtype) for value in x)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return None if x is None else x.astype(kind).astype(np.float64)


def state_dtype(dtype: str) -> str:
    """Return the dtype of parameters, coefficients and memories for a compute dtype."""
    return "float64" if dtype == "float64" else "float32"


def _function_inputs(case: Case, config: MCConfig, rng: np.random.Generator) -> FunctionInputs:
    memory, h, width = config.memory, config.num_heads, config.head_dim
    shape = (case.batch, case.tokens, h)
    q, k, u = rng.standard_normal((3, *shape, width))
    if case.ties:
        first = k[:, : config.segment_size]
        k = np.concatenate([first] * (case.tokens // config.segment_size + 1), 1)[:, : case.tokens]
    if config.normalizes_qk:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    values = width if memory.adds_input else width - 1
    dims = memory.widths(width, values)
    initial = tuple(
        rng.standard_normal((h, fan_out, fan_in)) / np.sqrt(fan_in)
        for fan_in, fan_out in pairwise(dims)
    )
    coefficients = {
        "step": rng.uniform(0.05, 0.3 if memory.gradient_uses_weights else 1.0, shape),
        "retention": rng.uniform(0.7, 1.0, shape),
    }
    if memory.has_momentum:
        coefficients["momentum"] = rng.uniform(0.2, 0.9, shape)
    if memory.uses_previous_token:
        coefficients["previous"] = rng.uniform(-1.0, 1.0, shape)
    v = rng.standard_normal((*shape, values))
    gain_and_bias = rng.uniform(0.5, 1.5, (2, h, values))
    norm = (gain_and_bias[0], gain_and_bias[1]) if memory.has_layer_norm else None
    gate_bias = rng.standard_normal(h) if config.has_gate_bias else None
    needs_u = config.projects_u
    return FunctionInputs(
        *rounded((q, k, v, u if needs_u else None), case.dtype),
        *rounded((initial, coefficients, norm, gate_bias), state_dtype(case.dtype)),
    )


def _mask(case: Case, rng: np.random.Generator) -> Array | None:
    if case.mask == "none":
        return None
    mask = rng.random((case.batch, case.tokens)) < 0.7
    if case.mask == "padded":
        mask = np.arange(case.tokens) < rng.integers(1, case.tokens + 1, (case.batch, 1))
    elif case.mask == "segment":
        size = case.layer.segment_size
        mask[0, size : 2 * size] = False
    elif case.mask == "row":
        mask[-1] = False
    return mask
