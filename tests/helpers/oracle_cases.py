"""Random inputs of the oracle, and comparison of results."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import oracle
from helpers.cases import Array, Coefficients
from mc_core import MCConfig
from oracle import OracleResult


class OracleCase(NamedTuple):
    """Random inputs; `run` takes changes to them."""

    q: Array
    k: Array
    v: Array
    u: Array | None
    initial: tuple[Array, ...]
    coefficients: Coefficients
    memory: Any
    norm: tuple[Array, Array] | None

    def run(self, aggregation: str = "grm", **options: Any) -> OracleResult:
        names = ("mask", "segment_lengths", "gate_bias", "temperature")
        inputs = {name: options.pop(name, None) for name in names}
        options = {"segment_size": 3, "chunk_size": 1, **options}
        config = MCConfig(8, 2, self.memory, aggregation, **options)
        *tensors, _, norm = self
        return oracle.memory_caching(*tensors, config, norm=norm, **inputs)

    def map_inputs(self, change: Callable[[Array], Array]) -> "OracleCase":
        """Apply a function to all inputs with a token axis, [b, t, h] or [b, t, h, k]."""
        return self._replace(
            **{name: change(getattr(self, name)) for name in "qkvu"},
            coefficients=Coefficients(*map(change, self.coefficients)),
        )


def make_case(memory: Any, tokens: int = 8, batch: int = 2, heads: int = 2) -> OracleCase:
    rng, width = np.random.default_rng(0), 4
    q, k, v, u = rng.standard_normal((4, batch, tokens, heads, width))
    depth = getattr(memory, "depth", 1)
    widths = [width, *[width * getattr(memory, "expansion", 1)] * (depth - 1), width]
    initial = tuple(
        rng.standard_normal((heads, out, into)) / np.sqrt(into) for into, out in pairwise(widths)
    )
    coefficients = Coefficients(*rng.uniform(0.7, 0.9, (4, batch, tokens, heads)))
    layered = getattr(memory, "norm", "none") == "layer"
    norm = tuple(rng.uniform(-1.5, 1.5, (2, heads, width))) if layered else None
    return OracleCase(q, k, v, u, initial, coefficients, memory, norm)


def close(a: Array, b: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
