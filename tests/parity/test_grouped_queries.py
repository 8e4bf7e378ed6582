"""Grouped-query attention equals attention with repeated heads of keys and values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers.cases import assert_close
from mc_core import AttentionConfig, MCConfig, ModelConfig
from mc_core.footprint import layer_parameters, model_parameters, state_bytes
from mc_core.tree_utils import flatten
from mc_core.weights import to_torch
from parity.weights import jax_weights, load_jax, load_torch

pytestmark = pytest.mark.usefixtures("float64", "strict")
HEADS, KV_HEADS, WIDTH = 4, 2, 16
GROUPED = {
    name: AttentionConfig(
        WIDTH, HEADS, window, conv_width=conv, output_norm="rms", num_kv_heads=KV_HEADS
    )
    for name, window, conv in (("full", None, 3), ("window", 3, 0))
}


def repeat_heads(x: np.ndarray) -> np.ndarray:
    """Repeat each head of the last axis for all heads of its group."""
    heads = x.reshape(*x.shape[:-1], KV_HEADS, -1)
    return np.repeat(heads, HEADS // KV_HEADS, axis=-2).reshape(*x.shape[:-1], -1)


def ungrouped(config: AttentionConfig, weights: dict[str, np.ndarray]) -> Any:
    """Return a JAX layer with all heads that computes the same function."""
    full = AttentionConfig.from_dict(config.to_dict() | {"num_kv_heads": None})
    layer = mc_jax.AttentionLayer(full, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    shared = ("k_proj", "v_proj", "k_conv", "v_conv")
    load_jax(
        layer,
        {name: repeat_heads(x) if name.startswith(shared) else x for name, x in weights.items()},
    )
    return layer


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_heads_equal_repeated_heads(name):
    """Full pass and stream, in both packages; the cache stores only the shared heads."""
    config = GROUPED[name]
    ours = mc_jax.AttentionLayer(config, rngs=nnx.Rngs(1), param_dtype=jnp.float64)
    weights = {
        key: x + 0.1 * np.random.default_rng(len(key)).standard_normal(x.shape)
        for key, x in jax_weights(ours).items()
    }
    load_jax(ours, weights)
    theirs = mc_torch.AttentionLayer(config, dtype=torch.float64)
    load_torch(theirs, to_torch(weights))
    x = np.random.default_rng(0).standard_normal((2, 9, WIDTH))
    reference = ungrouped(config, weights)
    expected = np.asarray(jax.jit(lambda x: reference(x))(x))
    assert_close(np.asarray(jax.jit(lambda x: ours(x))(x)), expected, 1e-10)
    with torch.no_grad():
        assert_close(theirs(torch.tensor(x)).numpy(), expected, 1e-10)
        cache, parts = theirs.init_cache(2, 9), []
        for part in torch.tensor(x).split([4, 1, 4], dim=1):
            y, cache = theirs.extend(part, cache)
            parts.append(y.numpy())
    assert_close(np.concatenate(parts, axis=1), expected, 1e-10)
    extend = jax.jit(lambda x, cache: ours.extend(x, cache))
    y, jax_cache = extend(x[:, :4], ours.init_cache(2, 9))
    assert_close(np.asarray(y), expected[:, :4], 1e-10)
    assert jax_cache.keys.shape[2:] == tuple(cache.keys.shape[2:]) == (KV_HEADS, WIDTH // HEADS)


@pytest.mark.parametrize("name", GROUPED)
def test_footprint_counts_shared_heads(name):
    config = GROUPED[name]
    layer = mc_torch.AttentionLayer(config)
    assert layer_parameters(config) == sum(x.numel() for x in layer.parameters())
    size = sum(x.nbytes for _, x in flatten(layer.init_cache(1, 9)))
    assert state_bytes(config, 9) == size
    model = ModelConfig(
        11, 2, MCConfig(WIDTH, HEADS), mixers=("memory", "window"), num_kv_heads=KV_HEADS
    )
    counted = sum(x.numel() for x in mc_torch.LanguageModel(model).parameters())
    assert model_parameters(model) == counted


def test_invalid_numbers_of_shared_heads_are_refused():
    with pytest.raises(ValueError, match=r"AttentionConfig\.num_kv_heads = 3: must be a divisor"):
        AttentionConfig(WIDTH, HEADS, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"AttentionConfig\.num_kv_heads = 0: must be >= 1"):
        AttentionConfig(WIDTH, HEADS, num_kv_heads=0)
    with pytest.raises(ValueError, match=r"ModelConfig\.num_kv_heads = 8: must be a divisor of nu"):
        ModelConfig(11, 1, MCConfig(WIDTH, HEADS), mixers=("attention",), num_kv_heads=8)
