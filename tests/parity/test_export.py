"""Exported programs: static token counts and dynamic batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.export import Dim, export

import mc_jax
import mc_torch
from helpers.cases import assert_close
from helpers.torch_layers import Extend
from mc_core import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_torch.chunk_layout import make_plan

FIXED = "must be static, because segments and chunks depend on it"
LAYERS = {
    "linear-grm": MCConfig(8, 2, LinearConfig(), "grm", segment_size=3, chunk_size=2),
    "swla-ssc": MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=3, chunk_size=2),
    "titans-soup": MCConfig(8, 2, TitansConfig(expansion=1), "soup", segment_size=3, chunk_size=2),
    "dla-residual": MCConfig(8, 2, DLAConfig(expansion=1), "residual", segment_size=3),
    "attention": AttentionConfig(8, 2, window=3, conv_width=2),
    "log-linear": LogLinearConfig(8, 2, 4, chunk_size=2),
}
SLOW = ("linear-grm", "swla-ssc", "titans-soup", "dla-residual", "log-linear")
MODEL = ModelConfig(11, 1, LAYERS["linear-grm"], ffn_width=8)
TOKENS = np.random.default_rng(0).integers(11, size=(2, 6))


def torch_layer(name: str) -> torch.nn.Module:
    config = LAYERS[name]
    return mc_torch.model.LAYERS[type(config)](config, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["attention", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)]
)
def test_pytorch_exports_dynamic_batch(name):
    layer = torch_layer(name)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    program = export(layer, (x[:2],), dynamic_shapes={"x": {0: Dim("rows", min=2, max=64)}})
    assert_close(program.module()(x).detach(), layer(x).detach(), 1e-12)


@pytest.mark.parametrize("name", ["titans-soup", "attention", "log-linear"])
def test_pytorch_rejects_dynamic_token_count(name):
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=FIXED):
        export(torch_layer(name), (x,), dynamic_shapes={"x": {1: Dim("t", max=64)}}, strict=False)


def test_pytorch_models_and_streams_reject_dynamic_token_count():
    model, tokens = mc_torch.LanguageModel(MODEL), torch.from_numpy(TOKENS)
    length = {1: Dim("t", max=8)}
    with pytest.raises(ValueError, match=FIXED):
        export(model, (tokens,), dynamic_shapes={"tokens": length}, strict=False)
    cache = model.init_cache(2, 8)
    shapes = {"tokens": length, "cache": torch.utils._pytree.tree_map(lambda x: None, cache)}
    with pytest.raises(ValueError, match=FIXED):
        export(Extend(model), (tokens, cache), dynamic_shapes=shapes, strict=False)


@pytest.mark.slow
@torch.no_grad()
def test_pytorch_exports_prompt_and_step_programs():
    model, tokens = mc_torch.LanguageModel(MODEL), torch.from_numpy(TOKENS)
    cache = model.init_cache(2, 8)
    prompt = export(Extend(model), (tokens[:, :5], cache), strict=False).module()
    step = export(Extend(model), (tokens[:, 5:], cache), strict=False).module()
    first, cache = prompt(tokens[:, :5], cache)
    last, cache = step(tokens[:, 5:], cache)
    assert_close(torch.cat([first, last], 1), model(tokens), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eager_calls_after_pytorch_export(strict):
    config = LAYERS["linear-grm"]
    layer = mc_torch.MemoryCachingLayer(config, dtype=torch.float64)
    x = torch.randn(2, 11, 8, dtype=torch.float64)  # no other test plans 11 tokens
    program = export(layer, (x,), strict=strict)
    y = layer(x)
    assert type(y) is torch.Tensor
    assert_close(program.module()(x), y, 1e-12)
    plan = make_plan(11, config, None, x.device)
    arrays = (plan.chunk_tokens, plan.chunk_positions, plan.segment_tokens, plan.segment_positions)
    assert all(type(index.positions) is torch.Tensor for index in arrays)


def jax_symbols(spec: str) -> tuple:
    return jax.export.symbolic_shape(spec)


@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
def test_jax_rejects_dynamic_token_count(aggregation):
    config = MCConfig(8, 2, LinearConfig(), aggregation, segment_size=3, chunk_size=2)
    layer = mc_jax.MemoryCachingLayer(config, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct(jax_symbols("2, t, 8"), jnp.float32)
    with pytest.raises(ValueError, match=FIXED):
        jax.export.export(jax.jit(lambda x: layer(x)))(x)
    cache = layer.init_cache(2, 8)
    with pytest.raises(ValueError, match=FIXED):
        jax.export.export(jax.jit(lambda x: layer.extend(x, cache)[0]))(x)


@pytest.mark.slow
def test_jax_exports_dynamic_batch():
    layer = mc_jax.MemoryCachingLayer(LAYERS["linear-grm"], rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    (rows,) = jax_symbols("rows, 1")[:1]

    def symbolic(x):
        return jax.ShapeDtypeStruct((rows, *x.shape[1:]) if x.ndim else (), x.dtype)

    def extend(leaves, x):
        y, cache = layer.extend(x, jax.tree.unflatten(structure, leaves))
        return y, jax.tree.leaves(cache)

    leaves, structure = jax.tree.flatten(layer.init_cache(2, 4))
    arguments = [symbolic(leaf) for leaf in leaves], symbolic(x[:, :1])
    step = jax.export.export(jax.jit(extend))(*arguments)
    for some in (x[:1], jnp.concatenate([x, x[:1]])):
        leaves, outputs = jax.tree.leaves(layer.init_cache(len(some), 4)), []
        for one in jnp.split(some, some.shape[1], axis=1):
            y, leaves = step.call(leaves, one)
            outputs.append(y)
        assert_close(jnp.concatenate(outputs, 1), layer(some), 1e-5)


def test_jax_models_and_attention_reject_dynamic_token_count():
    model = mc_jax.LanguageModel(MODEL, rngs=nnx.Rngs(0))
    tokens = jax.ShapeDtypeStruct(jax_symbols("2, t"), jnp.int32)
    cache = model.init_cache(2, 8)
    attention = mc_jax.AttentionLayer(AttentionConfig(8, 2), rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct(jax_symbols("2, t, 8"), jnp.float32)
    for function, symbol in (
        (lambda x: model(x), tokens),
        (lambda x: model.extend(x, cache)[0], tokens),
        (lambda x: attention(x), x),
    ):
        with pytest.raises(ValueError, match=FIXED):
            jax.export.export(jax.jit(function))(symbol)


@pytest.mark.slow
def test_jax_prompt_and_step_programs_serialize():
    model = mc_jax.LanguageModel(MODEL, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    # Serialized trees are plain: dictionaries, lists and tuples.
    def extend(leaves, tokens, cache):
        whole = jax.tree.unflatten(jax.tree.structure(params), leaves)
        cache = jax.tree.unflatten(structure, cache)
        logits, cache = nnx.merge(graph, whole).extend(tokens, cache)
        return logits, jax.tree.leaves(cache)

    cache, structure = jax.tree.flatten(model.init_cache(2, 8))
    leaves, tokens = jax.tree.leaves(params), jnp.asarray(TOKENS, jnp.int32)
    outputs = []
    for part in (tokens[:, :5], tokens[:, 5:]):
        program = jax.export.export(jax.jit(extend))(leaves, part, cache)
        restored = jax.export.deserialize(program.serialize())
        logits, cache = restored.call(leaves, part, cache)
        outputs.append(logits)
    assert_close(jnp.concatenate(outputs, 1), model(tokens), 1e-5)
