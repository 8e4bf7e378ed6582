"""`mc_jax.memory_caching` on a `cases.FunctionCase`: results and gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from helpers.cases import FunctionCase
from mc_core import MCConfig
from mc_jax import Coefficients, Result, memory_caching


def arrays(case: FunctionCase, dtype: Any = jnp.float64) -> dict[str, Any]:
    """Return the differentiable inputs as JAX arrays; parameters stay at least float32."""
    wide = dtype if dtype == jnp.float64 else jnp.float32
    to = lambda tree, dtype: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    return {
        **{name: to(getattr(case, name), dtype) for name in "qkvu"},
        "initial": to(case.initial, wide),
        "coefficients": Coefficients(*to(tuple(case.coefficients), wide)),
        "norm": to(case.norm, wide),
        "gate_bias": to(case.gate_bias, wide),
    }


def call(inputs: dict[str, Any], case: FunctionCase, method: str = "chunked") -> Result:
    """Run `memory_caching` on inputs from `arrays`."""
    mask = None if case.mask is None else jnp.asarray(case.mask)
    return _run(inputs, mask, case.config, case.lengths, method)


def run(case: FunctionCase, method: str = "chunked", dtype: Any = jnp.float64) -> Result:
    """Run a case, compiled."""
    return call(arrays(case, dtype), case, method)


def gradients(
    case: FunctionCase, method: str = "chunked", dtype: Any = jnp.float64
) -> dict[str, Any]:
    """Return the gradients of every input under random cotangents."""
    return run_with_gradients(case, method, dtype)[1]


def run_with_gradients(
    case: FunctionCase, method: str = "chunked", dtype: Any = jnp.float64
) -> tuple[Result, dict[str, Any]]:
    """Run a case forward and backward in one program."""

    def loss(inputs: dict[str, Any]) -> tuple[jax.Array, Result]:
        result = call(inputs, case, method)
        return projected(result), result

    (_, result), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays(case, dtype))
    return result, grads


def projected(result: Result, seed: int = 0) -> jax.Array:
    """Return the inner product of all results, including caches, with random cotangents."""
    rng = np.random.default_rng(seed)
    total = jnp.zeros((), jax.tree.leaves(result)[0].dtype)
    for leaf in jax.tree.leaves(result):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            total += jnp.sum(leaf * jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype))
    return total


@partial(jax.jit, static_argnames=("config", "lengths", "method"))
def _run(
    inputs: dict[str, Any],
    mask: jax.Array | None,
    config: MCConfig,
    lengths: tuple[int, ...] | None,
    method: str,
) -> Result:
    return memory_caching(
        **inputs, config=config, mask=mask, segment_lengths=lengths, method=method
    )
