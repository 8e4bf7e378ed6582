"""Errors of both packages for masks, padding, tokens and caches."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers import jax_calls, torch_calls
from helpers.cases import assert_close, make_case
from mc_core import (
    AttentionConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    TitansConfig,
)

pytestmark = pytest.mark.usefixtures("float64", "strict")

LAYER = MCConfig(8, 2, LinearConfig(), segment_size=4, chunk_size=4)
ATTENTION = AttentionConfig(8, 2)
MODEL = ModelConfig(11, 2, LAYER)
FRAMEWORKS = {"jax": (mc_jax, jnp.asarray), "torch": (mc_torch, torch.tensor)}
BOTH = pytest.mark.parametrize("framework", FRAMEWORKS)


def make(framework, name, config):
    package, array = FRAMEWORKS[framework]
    options = {"rngs": nnx.Rngs(0)} if framework == "jax" else {}
    return getattr(package, name)(config, **options), array


@pytest.fixture(params=FRAMEWORKS)
def fixtures(request):
    """Return layers of three kinds, a model and another layer, with tokens and ids."""
    made = {}
    for key, name, config in (
        ("layer", "MemoryCachingLayer", LAYER),
        ("attention", "AttentionLayer", ATTENTION),
        ("log-linear", "LogLinearAttentionLayer", LogLinearConfig(8, 2)),
        ("model", "LanguageModel", MODEL),
        ("other", "MemoryCachingLayer", MCConfig(8, 4, LinearConfig())),
    ):
        made[key], array = make(request.param, name, config)
    x = array(np.random.default_rng(0).standard_normal((2, 6, 8), dtype=np.float32))
    made |= {"x": x, "ids": array(np.ones((2, 6), np.int32)), "array": array}
    return made


@pytest.mark.parametrize("name", ["layer", "attention", "log-linear", "model"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (np.ones((2, 7), bool), r"has shape \(2, 7\) and dtype bool: must be \(2, 6\) and bool"),
        (np.ones(6, bool), r"has shape \(6,\) and dtype bool: must be \(2, 6\) and bool"),
        (np.zeros((2, 6), np.int32), r"has shape \(2, 6\) and dtype int32: must be"),
    ],
    ids=["longer", "flat", "numbers"],
)
def test_masks_and_padding_must_be_bool_with_token_shape(fixtures, name, flags, message):
    """Integer masks are rejected, because `~` is not their logical negation."""
    module, x, flags = (
        fixtures[name],
        fixtures["ids" if name == "model" else "x"],
        fixtures["array"](flags),
    )
    with pytest.raises(ValueError, match="mask " + message):
        module(x, flags)
    for word in ("mask", "padding"):
        with pytest.raises(ValueError, match=f"{word} {message}"):
            module.extend(x, module.init_cache(2, 20), **{word: flags})


@BOTH
def test_memory_caching_requires_bool_masks(framework):
    side = jax_calls if framework == "jax" else torch_calls
    case = make_case("linear", "grm")
    case = case._replace(mask=np.ones(case.q.shape[:2], np.int64))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 13\) and dtype int"):
        side.run(case)


@pytest.mark.parametrize("name", ["layer", "attention", "log-linear", "model"])
def test_extend_requires_at_least_one_token(fixtures, name):
    module, x = fixtures[name], fixtures["ids" if name == "model" else "x"]
    with pytest.raises(ValueError, match=r"shape \(2, 0.*t >= 1"):
        module.extend(x[:, :0], module.init_cache(2, 20))


def test_extend_rejects_caches_of_other_layers(fixtures):
    layer, attention, model, other, x = (
        fixtures[name] for name in ("layer", "attention", "model", "other", "x")
    )
    with pytest.raises(ValueError, match="cache is a KVCache: must be the layer's Cache"):
        layer.extend(x, attention.init_cache(2, 20))
    with pytest.raises(ValueError, match="cache is a Cache: must be the layer's KVCache"):
        attention.extend(x, layer.init_cache(2, 20))
    with pytest.raises(ValueError, match="cache is a Cache: must be the layer's LevelCache"):
        fixtures["log-linear"].extend(x, layer.init_cache(2, 20))
    with pytest.raises(
        ValueError, match="cache has 4 heads of width 2: must have 2 heads of width 4"
    ):
        layer.extend(x, other.init_cache(2, 20))
    with pytest.raises(ValueError, match="cache has 1 blocks: must have 2"):
        model.extend(fixtures["ids"], model.init_cache(2, 20)[:1])


@BOTH
@pytest.mark.parametrize("method", ["chunked", "recurrent"])
@pytest.mark.parametrize("lengths", [(5, 1, 1), (5, 2)])
def test_cache_with_explicit_segments_cannot_be_extended(framework, method, lengths):
    """The segment of the next token cannot be derived from its position."""
    side, package = (jax_calls, mc_jax) if framework == "jax" else (torch_calls, mc_torch)
    case = make_case("linear", "grm", tokens=7, lengths=lengths, segment_size=4)
    cache = side.run(case, method).cache
    message = "its segments are not those of a stream"
    with pytest.raises(ValueError, match=message):
        package.cache.check_capacity(cache, 1)
    with pytest.raises(ValueError, match=message):
        package.cache.grow(cache, case.config, 20)


@BOTH
@pytest.mark.parametrize("memory", ["linear", TitansConfig(expansion=1)], ids=["linear", "titans"])
def test_cache_with_configured_segments_can_be_extended(framework, memory):
    side = jax_calls if framework == "jax" else torch_calls
    case = make_case(memory, "residual", tokens=7, segment_size=4)
    cut = case._replace(lengths=(4, 3))
    left, right = side.run(case), side.run(cut)
    assert int(right.cache.capacity) == 7
    for a, b in ((left.output, right.output), (left.cache.total, right.cache.total)):
        assert_close(a, b, 1e-12)
