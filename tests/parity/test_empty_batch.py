"""Batches of 0 rows work in both packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers import torch_calls
from helpers.cases import make_case
from helpers.jax_calls import arrays
from mc_core import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.tree_utils import flatten

MEMORIES = {
    "linear": LinearConfig(),
    "normalized": LinearConfig(feature_map="elu+1", normalize=True),
    "swla": SWLAConfig(),
    "dla": DLAConfig(expansion=1),
    "titans": TitansConfig(expansion=1),
}
AGGREGATIONS = ("none", "residual", "grm", "soup", "ssc", "mean")
EVERY = [(m, a) for m in MEMORIES for a in AGGREGATIONS]
EACH = list(zip(MEMORIES, ("grm", "mean", "ssc", "residual", "soup"), strict=True))
TOKENS = 7


def config(memory, aggregation, **options):
    return MCConfig(
        4, 2, MEMORIES[memory], aggregation, segment_size=3, chunk_size=2, conv_width=2, **options
    )


def layers(package, pairs, **options):
    """Yield names and layers: memories, full and windowed attention."""
    for memory, aggregation in pairs:
        mode = "restart" if aggregation in ("soup", "mean") else "checkpoint"
        one = config(memory, aggregation, state_init_mode=mode)
        yield f"{memory}-{aggregation}", package.MemoryCachingLayer(one, **options)
    for window in (None, 2):
        one = AttentionConfig(4, 2, window=window, conv_width=2)
        yield f"attention-{window}", package.AttentionLayer(one, **options)


def passes(layer, x, mask):
    """Return outputs, cache and trace of a full pass and of a stream."""
    results = [layer(x)]
    if hasattr(layer, "inspect"):
        results = [*layer.inspect(x, mask), layer.forward_with_cache(x)[1]]
    cache = layer.init_cache(len(x), TOKENS)
    return *results, *layer.extend(x, cache, mask, padding=~mask)


def empty(tree):
    """Drop the row of a batch of one."""
    shared = ("capacity", "token_index", "segment_index", "cached_count")
    leaves = [(name, tuple(x.shape), x.dtype) for name, x in flatten(tree)]
    return [
        (name, shape if name.endswith(shared) else (0, *shape[1:]), dtype)
        for name, shape, dtype in leaves
    ]


def described(tree):
    return [(name, tuple(x.shape), x.dtype) for name, x in flatten(tree)]


@pytest.mark.slow
def test_torch_layers_with_empty_batch():
    """Outputs, caches and traces have the usual shapes and dtypes; gradients are zero."""
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    for name, layer in layers(mc_torch, EVERY):
        x = torch.ones(1, TOKENS, 4)
        none = passes(layer, x[:0], mask[:0])
        with torch.no_grad():
            assert described(none) == empty(passes(layer, x, mask)), name
        none[0].sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_jax_layers_with_empty_batch():
    def shapes(tree):
        return [(name, tuple(x.shape)) for name, x in flatten(tree)]

    none = torch.zeros(0, TOKENS, 4), torch.zeros(0, TOKENS, dtype=torch.bool)
    mirror = dict(layers(mc_torch, EACH))
    for name, layer in layers(mc_jax, EACH, rngs=nnx.Rngs(0)):
        given = jnp.zeros((0, TOKENS, 4)), jnp.zeros((0, TOKENS), bool)
        traced = jax.eval_shape(lambda *given: passes(layer, *given), *given)  # noqa: B023
        assert shapes(traced) == shapes(passes(mirror[name], *none)), name


@pytest.mark.parametrize("method", ["chunked", "recurrent"])
@pytest.mark.parametrize(("memory", "aggregation"), [("titans", "soup"), ("swla", "ssc")])
def test_memory_caching_with_empty_batch(memory, aggregation, method):
    """Both methods, with and without mask, explicit segments and inspection."""
    case = make_case(memory, aggregation, tokens=TOKENS, mask="some")
    case = case.map_inputs(lambda x: x[:0])._replace(mask=case.mask[:0])
    for one in (case, case._replace(mask=None), case._replace(lengths=(2, 5))):
        result = torch_calls.run(one, method)
        assert result.output.shape == case.v.shape
        assert not len(result.gates)
        assert not len(result.cache.segments.pool)
        assert not len(result.cache.position)
        gradients = torch_calls.gradients(one, method)
        assert not any(x.any() for x in jax.tree.leaves(gradients))
        options = {"mask": one.mask, "segment_lengths": one.lengths, "method": method}
        mirror = jax.eval_shape(
            lambda: mc_jax.memory_caching(**arrays(one, jnp.float32), config=one.config, **options)  # noqa: B023
        )
        assert [x[:2] for x in described(mirror)] == [x[:2] for x in described(result)]


def model_of(package, **options):
    layer = config("titans", "grm")
    return package.LanguageModel(
        ModelConfig(11, 2, layer, mixers=("memory", "window"), attention_window=3), **options
    )


@pytest.mark.slow
def test_models_with_empty_batch_have_gradients():
    """Compiled in JAX, where a division by the batch size would be NaN."""
    ids = np.zeros((0, TOKENS), np.int32)
    model = model_of(mc_jax, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    @jax.jit
    def run(params):
        return jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(jnp.asarray(ids))))(params)

    value, grads = run(params)
    assert value == 0
    assert not any(np.any(x) for x in jax.tree.leaves(grads))
    mirror = model_of(mc_torch)
    tokens = torch.tensor(ids)
    logits = mirror(tokens, None, torch.zeros(0, 2, dtype=torch.int64))
    assert logits.shape == (0, 2, 11)
    logits.sum().backward()
    assert not any(parameter.grad.any() for parameter in mirror.parameters())
    logits, traces = mirror.inspect(tokens)
    assert logits.shape == (0, TOKENS, 11)
    assert not len(traces[0].gates)


def test_streams_with_empty_batch():
    """Also with offloaded memories."""
    ids, padding = np.zeros((0, TOKENS), np.int32), np.zeros((0, TOKENS), bool)
    model = model_of(mc_torch)
    cache = model.init_cache(0, TOKENS, cache_device="host")
    logits, cache = model.extend(torch.tensor(ids), cache, padding=torch.tensor(padding))
    logits, cache = model.extend(torch.tensor(ids), cache)  # an empty batch needs no capacity
    assert logits.shape == (0, TOKENS, 11)
    assert not len(model.grow(cache, 2 * TOKENS)[0].stored.length)
    mirror = model_of(mc_jax, rngs=nnx.Rngs(0))
    cache = mirror.init_cache(0, TOKENS, cache_device="host")
    run = jax.jit(
        lambda cache: mirror.extend(jnp.asarray(ids), cache, padding=jnp.asarray(padding))
    )
    logits, cache = run(cache)
    assert logits.shape == (0, TOKENS, 11)
    assert not len(cache[0].position)
    mc_jax.check_capacity(cache[0], 99)


@pytest.mark.parametrize("package", [mc_jax, mc_torch])
def test_generation_with_empty_batch(package):
    options = {"rngs": nnx.Rngs(0)} if package is mc_jax else {}
    steps = list(package.generate(model_of(package, **options), [], 3))
    assert [tuple(step.shape) for step in steps] == [(0,)] * 3
    assert {str(step.dtype) for step in steps} <= {"int32", "torch.int64"}
    with pytest.raises(ValueError, match="rows has 1 elements: must have 0"):
        package.generate(model_of(package, **options), [], 3, rows=[0])


@pytest.mark.parametrize("package", [mc_jax, mc_torch])
def test_negative_batch_and_empty_sequences_are_rejected(package):
    options = {"rngs": nnx.Rngs(0)} if package is mc_jax else {}
    layer = package.MemoryCachingLayer(config("linear", "grm"), **options)
    with pytest.raises(ValueError, match="batch = -1: must be >= 0"):
        layer.init_cache(-1, 5)
    x = jnp.zeros((0, 0, 4)) if package is mc_jax else torch.zeros(0, 0, 4)
    with pytest.raises(ValueError, match="tokens = 0: must be >= 1"):
        layer(x)
    with pytest.raises(ValueError, match="t >= 1"):
        layer.extend(x, layer.init_cache(0, 5))
