"""Run a case with `mc_jax`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_jax import Coefficients, LanguageModel, MemoryCachingLayer, memory_caching
from parity.cases import Array, Case, FunctionInputs, Inputs, rounded, state_dtype
from parity.leaves import GRADIENT, Forward, Leaf, Leaves, cotangent, flatten
from parity.weights import Flat, jax_weights, load_jax

NOISE = 0.1  # added to parameters, so that no zero or one of a fresh model hides a fault


def parameters(case: Case) -> Flat:
    """Return the parameters of a case's module, float64, under JAX's names; none of a function."""
    if case.level == "function":
        return {}
    flat = jax_weights(build(case, "float32"))
    rng = np.random.default_rng([case.seed, 1])
    noise = NOISE if case.drawn else 0.0
    shaken = {name: x + noise * rng.standard_normal(x.shape) for name, x in flat.items()}
    return rounded(shaken, state_dtype(case.dtype))


def build(case: Case, dtype: str) -> Any:
    """Build a case's layer or model, with compute in `dtype`."""
    kind = LanguageModel if case.level == "model" else MemoryCachingLayer
    compute, param = jnp.dtype(dtype), jnp.dtype(state_dtype(dtype))
    return kind(case.config, rngs=nnx.Rngs(case.seed), dtype=compute, param_dtype=param)  # type: ignore[arg-type]


def run(
    case: Case, inputs: Inputs, weights: Flat, dtype: str | None = None, device: str = "cpu"
) -> Leaves:
    """Run a case forward and backward.

    Args:
        case: the case.
        inputs: from `draw`.
        weights: from `parameters`.
        dtype: instead of the case's own.
        device: cpu or cuda.
    """
    dtype = dtype or case.dtype
    with jax.enable_x64(True), jax.default_device(jax.devices(device)[0]):
        given = _variables(inputs, dtype)
        module = None
        if case.level != "function":
            module = build(case, dtype)
            wide = state_dtype(dtype)
            load_jax(module, {name: x.astype(wide) for name, x in weights.items()})
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)  # of a function: nothing

        def forward(given: Any, params: Any) -> Forward:
            return _forward(case, given, inputs, nnx.merge(graphdef, params, rest))

        @jax.jit
        def program(given: Any, params: Any) -> Any:
            result, pull = jax.vjp(forward, given, nnx.to_pure_dict(params))
            leaves = [_cotangent(name, leaf, case.seed) for name, leaf in flatten(result)]
            return result, pull(jax.tree.unflatten(jax.tree.structure(result), leaves))

        result, gradients = program(given, params)
    named = {name: _leaf(x) for name, x in flatten(result)}
    for part in gradients:
        named |= {name: _leaf(x) for name, x in flatten(part, GRADIENT)}
    found, wanted = named["output"].dtype, state_dtype(dtype) if case.level == "model" else dtype
    assert found == wanted, f"computed in {found}, not {wanted}"
    return named


def _variables(inputs: Inputs, dtype: str) -> Any:
    given, wide = inputs.differentiable, jnp.dtype(state_dtype(dtype))
    to = lambda tree, kind: jax.tree.map(lambda x: jnp.asarray(x, kind), tree)  # noqa: E731
    if isinstance(given, FunctionInputs):
        tokens = to(given[:4], jnp.dtype(dtype))
        return FunctionInputs(*tokens, *to(given[4:], wide))
    return to(given, jnp.dtype(dtype))


def _forward(case: Case, given: Any, inputs: Inputs, module: Any) -> Forward:
    mask = None if inputs.mask is None else jnp.asarray(inputs.mask)
    if isinstance(given, FunctionInputs):
        result = memory_caching(
            *given[:5],
            Coefficients(**given.coefficients),
            case.layer,
            mask=mask,
            segment_lengths=case.lengths,
            norm=given.norm,
            method=case.method,
        )
        return Forward(result.cache, None, result.gates, result.output)
    if case.level == "model":
        tokens = jnp.asarray(inputs.tokens, jnp.int32)
        trace = module.inspect(tokens, mask)[1]
        return Forward(None, jax.lax.stop_gradient(trace), None, module(tokens, mask))
    # What `forward_with_cache` and `inspect` show, in one pass: two would double the compile time.
    output, result = module._run(given["x"], mask, case.lengths)
    return Forward(result.cache, None, result.gates, output)


def _cotangent(name: str, leaf: jax.Array, seed: int) -> Any:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return jnp.asarray(cotangent(name, leaf.shape, seed), leaf.dtype)


def _leaf(x: jax.Array) -> Leaf:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    value: Array = np.asarray(x).astype(np.float64) if floating else np.asarray(x)
    return Leaf(value, str(x.dtype))
