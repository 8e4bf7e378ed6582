"""Hybrid models: memories, attention and windows, with and without feed-forward."""

import dataclasses
import functools
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
from helpers.generation_cases import PROMPTS, generate_by_full_passes, generate_tokens
from helpers.weight_cases import draw, jax_module, torch_module
from mc_core import (
    AttentionConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    TitansConfig,
)
from parity.weights import load_jax, load_torch, to_jax

pytestmark = pytest.mark.usefixtures("float64", "strict")

LAYER = MCConfig(8, 2, LinearConfig(), "grm", segment_size=4, chunk_size=3, conv_width=3)
HYBRID = ModelConfig(
    13, 3, LAYER, ffn_width=0, mixers=("window", "memory", "attention"), attention_window=3
)
MODELS = {
    "transformer": ModelConfig(
        13, 1, LAYER, ffn_width=12, tie_embeddings=False, mixers=("attention",)
    ),
    "hybrid": HYBRID,
    "titans": ModelConfig(
        13, 2, dataclasses.replace(LAYER, memory=TitansConfig(expansion=1), conv_width=0),
        tie_embeddings=False, mixers=("memory", "window"), attention_window=6,
    ),
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(13, size=(2, 11)).astype(np.int32)


@functools.cache
def both(name: str) -> tuple[Any, Any]:
    config = MODELS[name]
    flat = draw(config, "float64", seed=3)
    left, right = jax_module(config, jnp.float64), torch_module(config, torch.float64)
    load_jax(left, to_jax(flat))
    load_torch(right, flat)
    return left, right


def compiled(model: Any, method: str = "__call__") -> Any:
    graph, state = nnx.split(model)
    run = jax.jit(
        lambda s, *args, **options: getattr(nnx.merge(graph, s), method)(*args, **options)
    )
    return lambda *args, **options: run(state, *args, **options)


@pytest.mark.parametrize(
    "name", [m if m == "hybrid" else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_logits_and_gradients_agree_between_packages(name):
    left, right = both(name)
    mask = np.random.default_rng(1).random(TOKENS.shape) < 0.8
    weight = np.random.default_rng(2).standard_normal((*TOKENS.shape, 13))
    graph, state = nnx.split(left, nnx.Param)

    def loss(state: Any) -> Any:
        logits = nnx.merge(graph, state)(jnp.asarray(TOKENS), jnp.asarray(mask))
        return (logits * jnp.asarray(weight)).sum(), logits

    (_, expected), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    logits = right(torch.tensor(TOKENS).long(), torch.tensor(mask))
    assert_close(logits.detach().numpy(), expected, 1e-10)
    named = dict(right.named_parameters())
    found = torch.autograd.grad((logits * torch.tensor(weight)).sum(), list(named.values()))
    flat = to_jax(dict(zip(named, (g.numpy() for g in found), strict=True)))
    wanted = {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)
    }
    assert_close(flat, wanted, 1e-9)
    assert all(np.abs(g).max() > 1e-9 for g in flat.values())


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow if m == "titans" else ()) for m in MODELS]
)
def test_logits_are_causal(name):
    run, changed = compiled(both(name)[0]), TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 5) % 13
    before, after = (np.asarray(run(jnp.asarray(x))) for x in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before - after)[:, 6:].max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("name", [pytest.param("hybrid", marks=pytest.mark.slow), "transformer"])
def test_padded_streams_match_single_rows(name):
    """In both packages, with a cache that grows."""
    left, right = both(name)
    padding = np.random.default_rng(3).random(TOKENS.shape) < 0.3
    padding[0, :5] = True
    extend, results = compiled(left, "extend"), []
    for make, cache, go_on, grow in (
        (jnp.asarray, left.init_cache(2, 6), extend, left.grow),
        (torch.tensor, right.init_cache(2, 6), right.extend, right.grow),
    ):
        outputs = []
        for here in (slice(0, 5), slice(5, 6), slice(6, 11)):
            cache = grow(cache, 11) if here.start == 6 else cache
            y, cache = go_on(make(TOKENS[:, here]), cache, padding=make(padding[:, here]))
            outputs.append(np.asarray(y.detach() if isinstance(y, torch.Tensor) else y))
        results.append(np.concatenate(outputs, axis=1))
    for row, absent in enumerate(padding):
        with torch.no_grad():
            alone = right(torch.tensor(TOKENS[row : row + 1, ~absent]))[0].numpy()
        for package, y in zip(("jax", "torch"), results, strict=True):
            assert_close(y[row, ~absent], alone, 1e-10, name=f"{package} row {row}")


@pytest.mark.parametrize("name", ["transformer", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_greedy_generation_matches_full_passes(name):
    left, right = both(name)
    found = generate_tokens(left, PROMPTS, 9, block=4)
    other = np.stack([x.numpy() for x in mc_torch.generate(right, PROMPTS, 9, block=4)], axis=1)
    expected = generate_by_full_passes(right, PROMPTS, 9)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(other, expected)
    assert len(np.unique(found)) > 3


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_preserves_values_and_gradients(remat):
    again = jax_module(dataclasses.replace(HYBRID, remat=remat), jnp.float64)
    load_jax(again, to_jax(draw(HYBRID, "float64", seed=3)))
    with torch.no_grad():
        expected = both("hybrid")[1](torch.tensor(TOKENS))
    assert_close(compiled(again)(jnp.asarray(TOKENS)), expected, 1e-10)


def test_inspect_traces_blocks_with_memory():
    left, right = both("hybrid")
    logits, traces = compiled(left, "inspect")(jnp.asarray(TOKENS))
    with torch.no_grad():
        other, convert_to_torch = right.inspect(torch.tensor(TOKENS))
    assert_close(other.numpy(), logits, 1e-10)
    assert [trace is None for trace in traces] == [True, False, True]
    assert [trace is None for trace in convert_to_torch] == [True, False, True]
    assert traces[1].gates.shape == (2, 11, 2, 4)


def test_model_without_feed_forward():
    names = draw(HYBRID)
    assert not [name for name in names if "ffn" in name]
    assert [name for name in draw(MODELS["transformer"]) if "ffn" in name]


LAYERS = {
    "memory": MCConfig(
        8, 2, TitansConfig(expansion=1, norm="layer", coefficients="head"), conv_width=3
    ),
    "without u": MCConfig(8, 2, use_q_as_u=True),
    "attention": AttentionConfig(8, 2, conv_width=3),
    "log-linear": LogLinearConfig(8, 2, conv_width=3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_parameter_draws_follow_a_fixed_order(name):
    """Published results identify their initial parameters by the seed alone."""
    config = LAYERS[name]
    kind = type(config)
    ours = mc_jax.model.LAYERS[kind](config, rngs=nnx.Rngs(3), param_dtype=jnp.float64)
    torch.manual_seed(3)
    theirs = mc_torch.model.LAYERS[kind](config, dtype=torch.float64)
    names = ["q_proj", "k_proj", "v_proj", "u_proj", "out_proj"]
    if name != "memory":
        names.remove("u_proj")
    children = [x for x in dict(theirs.named_children()) if x.endswith("_proj")]
    assert children == names + ["level_proj"] * (name == "log-linear")
    rngs, _ = nnx.Rngs(3), torch.manual_seed(3)
    for each in names:
        linear = nnx.Linear(8, 8, use_bias=False, param_dtype=jnp.float64, rngs=rngs)
        np.testing.assert_array_equal(getattr(ours, each).kernel[...], linear.kernel[...], each)
        linear = mc_torch.modules.Linear(8, 8, dtype=torch.float64)
        torch.testing.assert_close(getattr(theirs, each).weight, linear.weight, rtol=0, atol=0)


def test_pytorch_parameter_order():
    """PyTorch optimizers identify parameters by their order."""
    layer = mc_torch.MemoryCachingLayer(LAYERS["memory"])
    parts = dict.fromkeys(name.partition(".")[0] for name, _ in layer.named_parameters())
    projections = ["q_proj", "k_proj", "v_proj", "u_proj", "out_proj"]
    convolutions = ["q_conv", "k_conv", "v_conv"]
    others = ["coefficients", "initial", "memory_norm", "output_norm"]
    assert list(parts) == projections + convolutions + others
