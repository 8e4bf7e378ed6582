"""Random inputs and tables of cases for all tests. NumPy only."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mc_core import DeltaConfig, DLAConfig, LinearConfig, MCConfig, SWLAConfig, TitansConfig

Array = np.ndarray

LAST: dict[str, Any] = {"written_layers": "last", "residual": False, "inner_clip": None}
MEMORIES: dict[str, Any] = {
    "linear": LinearConfig(),
    "linear-elu": LinearConfig(feature_map="elu+1"),
    "linear-normalized": LinearConfig(feature_map="elu+1", normalize=True),
    "swla": SWLAConfig(),
    "dla": DLAConfig(expansion=2),
    "dla-flat": DLAConfig(depth=1, residual=False),
    "dla-initial": DLAConfig(expansion=1, retention_target="initial"),
    "dla-deep": DLAConfig(depth=3, expansion=1, objective="l2", residual=False, inner_clip=None),
    "dla-orthogonal": DLAConfig(expansion=2, chunk_update="orthogonal"),
    "titans": TitansConfig(expansion=2),
    "titans-initial": TitansConfig(expansion=2, retention_target="initial"),
    "titans-flat": TitansConfig(depth=1, inner_clip=None),
    "titans-norm": TitansConfig(expansion=1, norm="layer", inner_clip=0.5),
    "titans-orthogonal": TitansConfig(
        expansion=1, retention_target="initial", chunk_update="orthogonal"
    ),
    "titans-dot": TitansConfig(depth=3, expansion=1, objective="dot"),
    "delta": DeltaConfig(),
    "titans-last": TitansConfig(expansion=2, **LAST),
    "titans-last-initial": TitansConfig(3, 1, retention_target="initial", **LAST),
    "dla-last": DLAConfig(expansion=2, **LAST),
}
# Reads are linear in the weights.
MATRICES = ("linear", "linear-elu", "swla", "delta", "titans-last", "dla-last")
KINDS = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("none", "residual", "grm", "soup", "ssc", "mean")
GATED = ("grm", "soup", "ssc")
GATES = ("context", "token")
MODES = ("checkpoint", "restart")
MASKS = ("none", "some", "padded", "segment", "row")


class Coefficients(NamedTuple):
    """Write coefficients, each [b, t, h] or None."""

    step: Array | None = None
    retention: Array | None = None
    momentum: Array | None = None
    previous: Array | None = None


class FunctionCase(NamedTuple):
    """Arguments of `memory_caching`."""

    q: Array  # [b, t, h, k]
    k: Array  # [b, t, h, k]
    v: Array  # [b, t, h, v]
    u: Array | None  # [b, t, h, k]
    initial: tuple[Array, ...]  # each [h, out, in]
    coefficients: Coefficients
    norm: tuple[Array, Array] | None  # each [h, v]
    config: MCConfig
    mask: Array | None = None  # bool [b, t]
    lengths: tuple[int, ...] | None = None
    gate_bias: Array | None = None  # [h]

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    @property
    def oracle_options(self) -> dict[str, Any]:
        """Return the options of the oracle."""
        return {
            "config": self.config,
            "mask": self.mask,
            "segment_lengths": self.lengths,
            "norm": self.norm,
            "gate_bias": self.gate_bias,
        }

    def with_config(self, **options: Any) -> "FunctionCase":
        """Change fields of the configuration."""
        return self._replace(config=MCConfig(**{**vars(self.config), **options}))

    def with_zero_decay(self) -> "FunctionCase":
        """Set retention and momentum to 0 at some tokens and close to 0 at others."""
        coefficients = self.coefficients
        token = np.arange(self.tokens)[:, None]

        def reduce_decay(x: Array | None) -> Array | None:
            if x is None:
                return None
            return np.where(token % 5 == 2, 0.0, np.where(token % 3 == 0, 0.01, x))

        changed = {
            "retention": reduce_decay(coefficients.retention),
            "momentum": reduce_decay(coefficients.momentum),
        }
        return self._replace(coefficients=coefficients._replace(**changed))

    def map_inputs(self, change: Any) -> "FunctionCase":
        """Apply a function to all inputs with a token axis, [b, t, h, ...]."""
        return self._replace(
            **{
                name: None if getattr(self, name) is None else change(getattr(self, name))
                for name in "qkvu"
            },
            coefficients=Coefficients(
                *(None if x is None else change(x) for x in self.coefficients)
            ),
        )


def make_case(
    memory: Any = "linear",
    aggregation: str = "grm",
    *,
    tokens: int = 13,
    batch: int = 2,
    heads: int = 2,
    width: int = 4,
    value_width: int | None = None,
    mask: str = "none",
    lengths: tuple[int, ...] | None = None,
    seed: int = 0,
    **options: Any,
) -> FunctionCase:
    """Draw inputs for a memory (a name of `MEMORIES`, or its configuration) and an aggregation.

    Without a residual connection, values are narrower than keys by one.
    """
    memory = MEMORIES[memory] if isinstance(memory, str) else memory
    rng = np.random.default_rng(seed)
    value_width = value_width or (width if memory.adds_input else width - 1)
    config = MCConfig(
        heads * width, heads, memory, aggregation, **{"segment_size": 4, "chunk_size": 3, **options}
    )
    q, k, u = rng.standard_normal((3, batch, tokens, heads, width))
    v = rng.standard_normal((batch, tokens, heads, value_width))
    if memory.normalizes_qk:  # as in the layer: otherwise the unclipped inner loop diverges
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    depth = getattr(memory, "depth", 1)
    dims = [width, *[width * getattr(memory, "expansion", 1)] * (depth - 1), value_width]
    initial = tuple(
        rng.standard_normal((heads, out, into)) / np.sqrt(into) for into, out in pairwise(dims)
    )
    shape = (batch, tokens, heads)
    largest = 0.3 if memory.gradient_uses_weights else 0.9 if memory.delta_rule else 1.5
    coefficients = Coefficients(
        step=rng.uniform(0.05, largest, shape),
        retention=rng.uniform(0.7, 1.0, shape),
        momentum=rng.uniform(0.2, 0.9, shape) if memory.has_momentum else None,
        previous=rng.uniform(-1.0, 1.0, shape) if memory.uses_previous_token else None,
    )
    norm = None
    if memory.has_layer_norm:
        norm = tuple(rng.uniform(-1.5, 1.5, (2, heads, value_width)))
    return FunctionCase(
        q,
        k,
        v,
        None if aggregation in ("none", "residual", "mean") else u,
        initial,
        coefficients,
        norm,
        config,
        make_mask(mask, batch, tokens, config, rng),
        lengths,
        rng.standard_normal(heads) if config.has_gate_bias else None,
    )


def make_mask(
    name: str, batch: int, tokens: int, config: MCConfig, rng: np.random.Generator
) -> Array | None:
    """Draw a mask of `some` tokens, `padded` ends, the second `segment`, or one `row`."""
    if name == "none":
        return None
    mask = rng.random((batch, tokens)) < 0.7
    if name == "padded":
        mask = np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1))
    elif name == "segment":
        mask[0, config.segment_size : 2 * config.segment_size] = False
    elif name == "row":
        mask[-1] = False
    return mask


def expand_mask(mask: Array, like: Array) -> Array:
    """Add trailing axes to a mask [b, t], to broadcast with `like` [b, t, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def assert_close(
    actual: Any, expected: Any, tolerance: float, floor: float = 1e-3, name: str = ""
) -> None:
    """Compare trees of arrays by the RMS error of each leaf.

    The error is relative to the leaf's RMS, or to `floor` if that is larger.
    """
    if expected is None or actual is None:
        assert actual is expected, f"{name}: only one is None"
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected:
            assert_close(actual[key], expected[key], tolerance, floor, f"{name}.{key}")
    elif isinstance(expected, Sequence):
        names = getattr(expected, "_fields", range(len(expected)))
        assert len(actual) == len(expected), f"{name}: {len(actual)} leaves, not {len(expected)}"
        for key, left, right in zip(names, actual, expected, strict=True):
            assert_close(left, right, tolerance, floor, f"{name}.{key}")
    else:
        left, right = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert left.shape == right.shape, f"{name}: shape {left.shape}, not {right.shape}"
        if not left.size:
            return
        assert np.isfinite(right).all(), f"{name}: the reference is not finite"
        error = rms(left - right) / max(rms(right), floor)
        assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance:.0e}"


def rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
