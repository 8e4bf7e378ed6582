"""The layer matches a NumPy oracle of its projections and memory (section 1)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oracle
from helpers.cases import MEMORIES, assert_close, make_mask
from helpers.layer_oracle import CONFIGS, EXACT, layer_oracle, make_layer, parameters
from mc_core import LinearConfig, MCConfig, TitansConfig
from mc_jax import MemoryCachingLayer

pytestmark = pytest.mark.usefixtures("float64", "strict")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("linear", "swla", "dla-plain") else ()
        )
        for name in CONFIGS
    ],
)
def test_layer_matches_oracle(name):
    """Section 1: output, gates and trace."""
    config = CONFIGS[name]
    layer = make_layer(config)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 11, 8))
    mask = make_mask("some", 2, 11, config, rng) if name != "linear" else None
    expected, gates = layer_oracle(parameters(layer), config, x, mask)
    mask_array = None if mask is None else jnp.asarray(mask)
    y, trace = nnx.jit(lambda layer, x: layer.inspect(x, mask_array))(layer, jnp.asarray(x))
    assert_close(y, expected, EXACT, name="output")
    assert_close(trace.gates, gates, EXACT, name="gates")
    segments = oracle.lengths_of(11, config)
    segment_of_token = np.repeat(np.arange(len(segments)), segments)
    np.testing.assert_array_equal(trace.token_index, np.arange(11))
    np.testing.assert_array_equal(trace.segment_index, segment_of_token)
    np.testing.assert_array_equal(trace.cached_count, segment_of_token)
    share = gates / np.maximum(gates.sum(-1, keepdims=True), 1e-300)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    assert_close(trace.entropy, entropy, EXACT, name="entropy")
    if config.aggregation not in ("none", "residual"):
        real = np.ones((2, 11), bool) if mask is None else mask
        assert_close(
            jnp.sum(trace.gates, -1),
            np.where(real[:, :, None], 1.0, 0.0) + np.zeros((1, 1, 2)),
            EXACT,
        )


def compiled(layer: MemoryCachingLayer, call: Callable[..., Any], *args: Any) -> Any:
    return nnx.jit(call)(layer, *args)


@pytest.mark.slow
def test_forward_cache_and_inspect_agree():
    """`__call__`, `forward_with_cache` and `inspect` agree on output, norms and lengths."""
    layer, mask = make_layer(CONFIGS["titans"]), jnp.asarray(np.arange(11) < [[11], [6]])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 8)))
    plain = compiled(layer, lambda m, x: m(x, mask), x)
    cached, cache = compiled(layer, lambda m, x: m.forward_with_cache(x, mask), x)
    inspected, trace = compiled(layer, lambda m, x: m.inspect(x, mask), x)
    assert_close((cached, inspected), (plain, plain), 1e-13)
    assert [w.shape for w in cache.segments.weights] == [(2, 3, 2, 8, 4), (2, 3, 2, 4, 8)]
    np.testing.assert_array_equal(cache.segments.length, [[4, 4, 3], [4, 2, 0]])
    np.testing.assert_array_equal(trace.segment_length, cache.segments.length)
    squares = sum((np.asarray(w) ** 2).sum((-2, -1)) for w in cache.segments.weights)
    assert_close(trace.segment_norm, np.sqrt(squares), EXACT)


def test_explicit_segment_lengths():
    layer = make_layer(CONFIGS["swla"])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 8)))
    plain, same, other = (
        compiled(layer, lambda m, x, n=n: m(x, segment_lengths=n), x)
        for n in (None, (3, 3, 2), (1, 7))
    )
    assert_close(same, plain, 1e-13)
    assert np.abs(np.asarray(other - plain)).max() > 1e-4


@pytest.mark.parametrize("name", ["swla", pytest.param("titans-norm", marks=pytest.mark.slow)])
def test_values_at_masked_tokens_are_ignored(name):
    """NaN at masked tokens does not reach outputs and gradients, also with convolutions."""
    layer, config = make_layer(CONFIGS[name]), CONFIGS[name]
    rng = np.random.default_rng(1)
    x, mask = rng.standard_normal((2, 11, 8)), make_mask("segment", 2, 11, config, rng)
    graph, state = nnx.split(layer)

    @jax.jit
    def run(state: nnx.State, x: jax.Array) -> Any:
        def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, state)(x, jnp.asarray(mask))
            return jnp.sum(jnp.sin(y)), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

    results = [run(state, jnp.where(mask[:, :, None], x, junk)) for junk in (0.0, jnp.nan)]
    for left, right in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(left, right)
        assert np.isfinite(np.asarray(right)).all()
    assert not np.asarray(results[1][0][1])[~mask].any()
    assert not np.asarray(results[1][1][1])[~mask].any()


def test_parameter_initialization():
    """Sections 1 and 2: a random W_0 for an MLP, zeros for a matrix; coefficients as configured."""
    memory = TitansConfig(expansion=4, step=0.07, momentum=0.8, retention=0.99)
    layer = MemoryCachingLayer(MCConfig(128, 2, memory, conv_width=4), rngs=nnx.Rngs(0))
    p = parameters(layer)
    shapes = [(2, 256, 64), (2, 64, 256)]
    for i, shape in enumerate(shapes):
        assert p["initial"][i].shape == shape
        assert np.std(p["initial"][i]) == pytest.approx(shape[-1] ** -0.5, rel=0.05)
    for name, value in (("step", 0.07), ("momentum", 0.8), ("retention", 0.99)):
        bias = p["coefficients"][name]["bias"].astype(np.float64)
        np.testing.assert_allclose(1 / (1 + np.exp(-bias)), value, rtol=1e-5)
    assert {x.dtype for x in jax.tree.leaves(p)} == {np.dtype(np.float32)}
    options = {"gate_bias": 0.7, "softmax_temperature": "learned"}
    gates = parameters(MemoryCachingLayer(MCConfig(8, 2, **options), rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(gates["gate_bias"], np.full(2, 0.7, np.float32))
    np.testing.assert_array_equal(gates["gate_temperature"], np.zeros(2))
    conv = p["q_conv"]["kernel"]  # the identity
    np.testing.assert_array_equal(conv, np.eye(4)[3][:, None] * np.ones((1, 128)))
    plain = parameters(MemoryCachingLayer(MCConfig(8, 2), rngs=nnx.Rngs(0)))
    assert not plain.get("initial")
    assert not plain.get("coefficients")  # constants
    learned = MCConfig(8, 2, LinearConfig(learn_initial=True, coefficients="head"))
    zero = parameters(MemoryCachingLayer(learned, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(zero["initial"][0], np.zeros((2, 4, 4)))
    start = zero["coefficients"]["retention"]["bias"]  # a sigmoid cannot reach 1
    np.testing.assert_allclose(1 / (1 + np.exp(-start)), 0.999, rtol=1e-6)


def test_parameter_names_by_configuration():
    names = lambda config: set(parameters(MemoryCachingLayer(config, rngs=nnx.Rngs(0))))  # noqa: E731
    base = {"q_proj", "k_proj", "v_proj", "out_proj"}
    for aggregation in ("grm", "soup", "ssc"):
        assert names(MCConfig(8, 2, aggregation=aggregation)) >= base | {"u_proj", "output_norm"}
        assert "u_proj" not in names(MCConfig(8, 2, aggregation=aggregation, use_q_as_u=True))
    for aggregation in ("none", "residual", "mean"):
        assert "u_proj" not in names(MCConfig(8, 2, aggregation=aggregation))
    assert "output_norm" not in names(MCConfig(8, 2, output_norm="none"))
    assert names(MCConfig(8, 2, conv_width=1)) >= {"q_conv", "k_conv", "v_conv"}
    assert "memory_norm" in names(MCConfig(8, 2, MEMORIES["titans-norm"]))
    assert "memory_norm" not in names(MCConfig(8, 2, MEMORIES["titans"]))
    options = {"gate_bias": 0.0, "softmax_temperature": "learned"}
    for aggregation in ("grm", "soup", "ssc", "mean"):
        extra = names(MCConfig(8, 2, aggregation=aggregation, **options))
        extra -= names(MCConfig(8, 2, aggregation=aggregation, pool_norm="l2"))
        assert extra == (set() if aggregation == "mean" else {"gate_bias", "gate_temperature"})


def test_every_parameter_has_a_gradient():
    config = MCConfig(
        8, 2, TitansConfig(2, 2, norm="layer"), "grm", conv_width=2, segment_size=3, chunk_size=2,
        gate_bias=1.0, softmax_temperature="learned", pool_norm="l2",
    )  # fmt: skip
    graph, state = nnx.split(make_layer(config))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 8)))
    grads = jax.jit(jax.grad(lambda s: jnp.sum(jnp.sin(nnx.merge(graph, s)(x)))))(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(np.asarray(leaf)).max() > 1e-8, jax.tree_util.keystr(path)


def test_invalid_inputs_are_rejected():
    layer = make_layer(CONFIGS["linear"])
    for shape in ((2, 8), (2, 3, 7), (1, 2, 3, 8)):
        with pytest.raises(ValueError, match=r"x has shape .* must be \[b, t, 8\]"):
            layer(jnp.zeros(shape))
