"""The language model: composition, causality, remat, output heads and compute dtypes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_torch
from helpers.cases import assert_close
from helpers.layer_oracle import layer_oracle
from mc_core import LinearConfig, MCConfig, ModelConfig, TitansConfig
from mc_core.config import NORM_EPS
from mc_jax import LanguageModel

LAYER = MCConfig(8, 2, TitansConfig(2, 2), "grm", segment_size=4, chunk_size=3)
CONFIG = ModelConfig(vocab_size=13, num_layers=2, layer=LAYER)
TOKENS = np.random.default_rng(0).integers(0, 13, (2, 11)).astype(np.int32)


def make_model(dtype: Any = jnp.float64, **options: Any) -> LanguageModel:
    config = dataclasses.replace(CONFIG, **options)
    return LanguageModel(config, rngs=nnx.Rngs(0), param_dtype=dtype)


def run(model: LanguageModel, tokens: np.ndarray, mask: np.ndarray | None = None) -> jax.Array:
    graph, state = nnx.split(model)
    mask = None if mask is None else jnp.asarray(mask)
    return jax.jit(lambda s, t: nnx.merge(graph, s)(t, mask))(state, jnp.asarray(tokens))


def loss_and_grads(model: LanguageModel) -> tuple[jax.Array, Any]:
    graph, state = nnx.split(model, nnx.Param)

    def loss(state: nnx.State) -> jax.Array:
        logits = nnx.merge(graph, state)(jnp.asarray(TOKENS))
        picked = jnp.take_along_axis(logits[:, :-1], jnp.asarray(TOKENS)[:, 1:, None], -1)
        return jnp.mean(jax.nn.logsumexp(logits[:, :-1], -1) - picked[..., 0])

    value, grads = jax.jit(jax.value_and_grad(loss))(state)
    return value, nnx.to_pure_dict(grads)


@pytest.mark.usefixtures("float64", "strict")
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_model_is_composition_of_blocks(tied):
    """Pre-norm blocks `x + memory(norm(x))`, `x + ffn(norm(x))`, norm and head."""
    model = make_model(tie_embeddings=tied, num_layers=2)
    mask = np.arange(11) < np.array([[11], [7]])
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS) * scale

    x = p["embed"]["embedding"][np.where(mask, TOKENS, 0)]  # a masked id is not read
    for i in range(2):
        block = p["blocks"][i]
        x = x + layer_oracle(block["mixer"], LAYER, norm(x, block["mixer_norm"]["scale"]), mask)[0]
        y = norm(x, block["ffn_norm"]["scale"])
        gate = y @ block["ffn"]["gate_proj"]["kernel"]
        hidden = gate / (1 + np.exp(-gate)) * (y @ block["ffn"]["up_proj"]["kernel"])
        x = x + hidden @ block["ffn"]["down_proj"]["kernel"]
    head = p["embed"]["embedding"].T if tied else p["head"]["kernel"]
    assert_close(run(model, TOKENS, mask), norm(x, p["norm"]["scale"]) @ head, 1e-9)
    assert ("head" in p) != tied


@pytest.mark.usefixtures("float64", "strict")
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_logits_at_places_match_all_logits(framework):
    """Places may be unordered, repeated and different per row."""
    places = np.array([[10, 0, 3], [5, 5, 1]])
    if framework == "jax":
        model = make_model(num_layers=1)
        every = np.asarray(run(model, TOKENS))
        graph, state = nnx.split(model)
        some = np.asarray(
            jax.jit(lambda s, *a: nnx.merge(graph, s)(a[0], None, a[1]))(state, TOKENS, places)
        )
    else:
        config = dataclasses.replace(CONFIG, num_layers=1)
        torch_model = mc_torch.LanguageModel(config, dtype=torch.float64)
        ids = torch.from_numpy(TOKENS).long()
        with torch.no_grad():
            every = torch_model(ids).numpy()
            some = torch_model(ids, None, torch.from_numpy(places)).numpy()
    assert some.shape == (2, 3, 13)
    np.testing.assert_allclose(some, every[np.arange(2)[:, None], places], rtol=1e-12)


@pytest.mark.usefixtures("float64", "strict")
def test_logits_are_causal():
    model, changed = make_model(), TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 5) % 13
    before, after = np.asarray(run(model, TOKENS)), np.asarray(run(model, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before - after)[:, 6:].max(axis=(0, 2)).min() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "strict")
def test_remat_preserves_values_and_gradients():
    value, grads = loss_and_grads(make_model(num_layers=1))
    again, regrads = loss_and_grads(make_model(num_layers=1, remat=True))
    assert_close((again, regrads), (value, grads), 1e-12)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(np.asarray(leaf)).max() > 1e-9, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "strict")
def test_inspect_returns_logits_and_one_trace_per_block():
    model = make_model()
    graph, state = nnx.split(model)
    logits, traces = jax.jit(lambda s, t: nnx.merge(graph, s).inspect(t))(
        state, jnp.asarray(TOKENS)
    )
    assert_close(logits, run(model, TOKENS), 1e-12)
    assert len(traces) == 2
    for trace in traces:
        assert trace.gates.shape == (2, 11, 2, 4)
        assert_close(jnp.sum(trace.gates, -1), np.ones((2, 11, 2)), 1e-12)


@pytest.mark.slow
def test_masked_tokens_do_not_change_other_logits():
    model, mask = make_model(jnp.float32), np.arange(11) < np.array([[11], [7]])
    changed = np.where(mask, TOKENS, 3)
    left, right = (np.asarray(run(model, t, mask)) for t in (TOKENS, changed))
    np.testing.assert_array_equal(left[mask], right[mask])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_logits_are_float32_with_bfloat16_compute(tied):
    """Section 8: products in the compute dtype, float32 parameters, gradients and logits."""
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, num_layers=1)
    model = LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    exact = LanguageModel(config, rngs=nnx.Rngs(0))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float32)}
    logits = run(model, TOKENS)
    assert logits.dtype == jnp.float32
    assert run(exact, TOKENS).dtype == jnp.float32
    assert_close(logits, run(exact, TOKENS), 0.05)
    _, grads = loss_and_grads(model) if tied else (None, nnx.state(model))
    assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype(np.float32)}


def test_seed_determines_parameters():
    config = dataclasses.replace(CONFIG, layer=MCConfig(8, 2, LinearConfig()))
    models = [LanguageModel(config, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1)]
    first, again, other = (jax.tree.leaves(nnx.state(m)) for m in models)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    assert any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(first, other, strict=True))
