"""Section 8: dtypes of computations, and their error relative to float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from helpers import torch_calls
from helpers.cases import KINDS, FunctionCase, assert_close, make_case, rms
from helpers.jax_calls import arrays, call, projected, run
from mc_core import AttentionConfig, MCConfig, TitansConfig
from mc_jax import AttentionLayer, MemoryCachingLayer

pytestmark = pytest.mark.usefixtures("strict")
AGGREGATION = dict(zip(KINDS, ("ssc", "residual", "soup", "grm"), strict=True))
methods = pytest.mark.parametrize(
    "method", ["chunked", pytest.param("recurrent", marks=pytest.mark.slow)]
)
every_memory = pytest.mark.parametrize(
    "memory",
    [pytest.param(m, marks=pytest.mark.slow if m in ("linear", "dla") else ()) for m in KINDS],
)


def long_case(memory: str, **options: Any) -> FunctionCase:
    """Draw 128 tokens of width 16, rounded to bfloat16, so that all dtypes get the same inputs."""
    case = make_case(
        memory,
        AGGREGATION[memory],
        tokens=128,
        heads=1,
        width=16,
        value_width=16,
        **{"segment_size": 40, "chunk_size": 16, **options},
    )
    rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)  # noqa: E731
    case = case._replace(**{n: x for n in "qkvu" if (x := getattr(case, n)) is not None})
    return case.map_inputs(rounded)._replace(initial=tuple(map(rounded, case.initial)))


def exact(case: FunctionCase) -> Any:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(case))


@every_memory
@methods
def test_float32_is_close_to_float64(memory, method):
    """2e-6 relative RMS at 128 tokens, for outputs, caches and gates."""
    case = long_case(memory)
    result = run(case, method, jnp.float32)
    expected = exact(case)
    assert {x.dtype for x in jax.tree.leaves(expected) if x.dtype.kind == "f"} == {np.dtype("f8")}
    assert_close(result.output, expected.output, 2e-6, name="output")
    assert_close(result.gates, expected.gates, 2e-6, name="gates")
    assert_close(result.cache, expected.cache, 2e-6, name="cache")


@pytest.mark.parametrize(
    ("framework", "memory"),
    [
        ("jax", "linear"),
        *(pytest.param("jax", m, marks=pytest.mark.slow) for m in ("swla", "dla", "titans")),
        *(("torch", m) for m in KINDS),
    ],
)
def test_float32_is_close_to_float64_with_zero_retention(framework, memory):
    """Small factors have large logarithms, which must not affect later tokens of the chunk."""
    case = long_case(memory, segment_size=64, chunk_size=64).with_zero_decay()
    if framework == "jax":
        output = run(case, "chunked", jnp.float32).output
    else:
        output = torch_calls.run(case, "chunked", torch.float32).output.numpy()
    assert_close(output, exact(case).output, 2e-6, name="output")


@pytest.mark.parametrize("memory", ["swla", pytest.param("titans", marks=pytest.mark.slow)])
def test_float32_gradients_are_close_to_float64(memory):
    case = long_case(memory)
    gradient = jax.jit(jax.grad(lambda x: projected(call(x, case)._replace(cache=()))))
    single = gradient(arrays(case, jnp.float32))
    with jax.enable_x64(True):
        double = jax.tree.map(np.asarray, gradient(arrays(case)))
    assert_close(single, double, 1e-5)


@every_memory
@methods
def test_state_is_float32_with_bfloat16_inputs(memory, method):
    """State, gates, pools and scores stay float32; the output has the inputs' dtype."""
    case = long_case(memory)
    result = run(case, method, jnp.bfloat16)
    assert result.output.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((result.gates, result.cache)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    expected = exact(case)
    # Sums of 128 rounded products; gates and pools depend only on inputs, which are exact.
    assert_close(result.output.astype(jnp.float32), expected.output, 2e-2, name="output")
    assert_close(result.gates, expected.gates, 2e-6, name="gates")
    assert_close(result.cache.segments.pool, expected.cache.segments.pool, 2e-6, name="pools")
    assert_close(result.cache.segments.weights, expected.cache.segments.weights, 1e-2, name="W")


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("memory", [pytest.param("linear", marks=pytest.mark.slow), "swla"])
def test_recurrence_accumulates_in_float32(memory, framework):
    """A matrix memory's write is a sum of v kᵀ, which is exact in float32 for bfloat16 inputs."""
    case = long_case(memory)
    if framework == "jax":
        cache = run(case, "recurrent", jnp.bfloat16).cache
    else:
        cache = torch_calls.run(case, "recurrent", torch.bfloat16).cache
    expected = exact(case).cache
    assert_close(np.asarray(cache.state.weights[0]), expected.state.weights[0], 2e-6)


def test_long_sums_accumulate_in_float32():
    """A bfloat16 running sum of ones would stall at 256."""
    case = make_case("linear", "grm", tokens=1000, heads=1, batch=1, segment_size=1000)
    ones = case.map_inputs(np.ones_like)._replace(initial=tuple(map(np.zeros_like, case.initial)))
    result = run(ones.with_config(pooling="sum", chunk_size=64), dtype=jnp.bfloat16)
    np.testing.assert_array_equal(result.cache.segments.pool, np.full((1, 1, 1, 4), 1000.0))
    np.testing.assert_array_equal(result.cache.state.weights[0], np.full((1, 1, 3, 4), 1000.0))
    np.testing.assert_array_equal(result.cache.length, [1000])


def test_decay_products_are_precise_over_a_chunk():
    """With bfloat16 inputs, retention near 1 and its products are float32."""
    case = make_case("linear", "none", tokens=256, segment_size=256, chunk_size=256)
    case = case._replace(
        coefficients=case.coefficients._replace(retention=np.full((2, 256, 2), 0.9995))
    )
    zero = case._replace(v=np.zeros_like(case.v))
    result = run(zero, dtype=jnp.bfloat16)
    expected = case.initial[0].astype(np.float32) * 0.9995**256
    assert_close(np.asarray(result.cache.state.weights[0])[0], expected, 1e-5)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MemoryCachingLayer, MCConfig(16, 2, TitansConfig(), segment_size=8, conv_width=4)),
        (AttentionLayer, AttentionConfig(16, 2)),
    ],
    ids=["memory", "attention"],
)
def test_layer_without_dtype_computes_in_input_dtype(kind, config):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 16)), jnp.bfloat16)
    layers = (kind(config, rngs=nnx.Rngs(0), dtype=dtype) for dtype in (jnp.bfloat16, None))
    np.testing.assert_array_equal(*(nnx.jit(lambda layer: layer(x))(layer) for layer in layers))


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_layer_returns_input_dtype(dtype):
    config = MCConfig(16, 2, TitansConfig(), segment_size=16, chunk_size=8)
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    reference = MemoryCachingLayer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 16)), dtype)
    forward = partial(nnx.jit, lambda m, x: m.forward_with_cache(x))
    y, cache = forward()(layer, x)
    assert y.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {np.dtype("f4"), np.dtype("i4")}
    expected = forward()(reference, x.astype(jnp.float32))[0]
    error = rms(np.asarray(y, np.float32) - np.asarray(expected)) / rms(np.asarray(expected))
    assert error < 3e-2
