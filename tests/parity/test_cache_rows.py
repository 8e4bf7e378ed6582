"""Reordering, repeating and dropping rows of a cache: beam search, sampling, finished rows."""

import copy
import pickle
from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers.cases import assert_close
from mc_core import (
    DLAConfig,
    LinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.tree_utils import flatten

VOCABULARY = 7
MEMORIES = {
    "linear": (LinearConfig(feature_map="elu+1", normalize=True), "grm"),
    "swla": (SWLAConfig(), "residual"),
    "dla": (DLAConfig(expansion=1), "ssc"),
    "titans": (TitansConfig(expansion=1), "soup"),
}
PROMPTS = np.random.default_rng(0).integers(VOCABULARY, size=(3, 5))
PADDING = np.array([[True, True, False, False, False], [False] * 5, [True] + [False] * 4])
NEXT = np.random.default_rng(1).integers(VOCABULARY, size=(3, 4))


def make_config(name: str, mixers: tuple[str, ...] = ("memory", "attention", "window")):
    memory, aggregation = MEMORIES[name]
    layer = MCConfig(8, 2, memory, aggregation, segment_size=3, chunk_size=2, conv_width=3)
    return ModelConfig(
        VOCABULARY, len(mixers), layer, ffn_width=0, mixers=mixers, attention_window=3
    )


def make_model(name: str) -> mc_torch.LanguageModel:
    torch.manual_seed(0)
    return mc_torch.LanguageModel(make_config(name), dtype=torch.float64)


def stream(model, rows: list[int], device: str = "device"):
    """Return logits and cache after prompts of different lengths."""
    tokens, padding = torch.from_numpy(PROMPTS[rows]), torch.from_numpy(PADDING[rows])
    cache = model.init_cache(len(rows), 16, cache_device=device)
    return model.extend(tokens, cache, padding=padding)


def assert_same_streams(model, actual, rows: list[int], device: str = "device"):
    """Compare a cache and its continuation with those of the same rows alone."""
    _, expected = stream(model, rows, device)
    assert_close(dict(flatten(actual)), dict(flatten(expected)), 1e-12)
    tokens = torch.from_numpy(NEXT[rows])
    assert_close(model.extend(tokens, actual)[0], model.extend(tokens, expected)[0], 1e-12)


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0, 2], [2], []], ids=str)
@torch.no_grad()
def test_selected_rows_continue_independently(name, rows):
    model = make_model(name)
    _, cache = stream(model, [0, 1, 2])
    before = copy.deepcopy(cache)
    selected = mc_torch.take_rows(cache, rows)
    if rows:
        assert_same_streams(model, selected, rows)
    else:
        assert {one.position.shape for one in selected} == {(0,)}
    assert [one.capacity.item() for one in selected] == [16, 16, 16]
    model.extend(torch.from_numpy(NEXT[rows]), selected)
    assert_close(dict(flatten(cache)), dict(flatten(before)), 0)  # the source is unchanged


@torch.no_grad()
def test_offloaded_rows_stay_on_host():
    model = make_model("dla")
    _, cache = stream(model, [0, 1, 2], "host")
    assert_same_streams(model, mc_torch.take_rows(cache, [2, 0]), [2, 0], "host")


@torch.no_grad()
def test_cache_take_equals_take_rows():
    for name in MEMORIES:
        layer = mc_torch.MemoryCachingLayer(make_config(name).layer, dtype=torch.float64)
        x = torch.from_numpy(np.random.default_rng(2).standard_normal((2, 5, 8)))
        _, cache = layer.extend(x, layer.init_cache(2, 9))
        alone = layer.extend(x[1:], layer.init_cache(1, 9))[1]
        assert_close(dict(flatten(cache.take([1]))), dict(flatten(alone)), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [pytest.param("titans", marks=pytest.mark.slow), "swla"])
def test_take_rows_under_jit(name):
    model = mc_jax.LanguageModel(
        make_config(name), rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64
    )
    graph, params = nnx.split(model)

    @jax.jit
    def run(params, prompts, padding, rows, tokens):
        model = nnx.merge(graph, params)
        _, cache = model.extend(prompts, model.init_cache(3, 16), padding=padding)
        return model.extend(tokens, mc_jax.take_rows(cache, rows))[0]

    rows = [2, 0, 0]
    arguments = jnp.asarray(PROMPTS), jnp.asarray(PADDING)
    actual = run(params, *arguments, jnp.asarray(rows), jnp.asarray(NEXT[rows]))
    straight = run(params, *arguments, jnp.arange(3), jnp.asarray(NEXT))
    assert_close(actual, straight[jnp.asarray(rows)], 1e-12)
    invalid = run(params, *arguments, jnp.asarray([0, 3, -1]), jnp.asarray(NEXT))
    assert np.isnan(invalid[1:]).all()  # a compiled program cannot raise
    assert_close(invalid[0], straight[0], 1e-12)


@torch.no_grad()
def test_beam_search_matches_brute_force():
    """The beam contains all continuations, and every step reorders rows."""
    model, steps = make_model("titans"), 3
    logits, cache = stream(model, [1])
    cache = mc_torch.take_rows(cache, [0] * VOCABULARY)
    score = logits[0, -1].log_softmax(-1)
    beams = torch.arange(VOCABULARY)[:, None]
    for _ in range(steps - 1):
        logits, cache = model.extend(beams[:, -1:], cache)
        total = (score[:, None] + logits[:, -1].log_softmax(-1)).flatten()
        score, index = total.sort(descending=True, stable=True)
        rows, token = index // VOCABULARY, index % VOCABULARY
        cache = mc_torch.take_rows(cache, rows)
        beams = torch.cat([beams[rows], token[:, None]], dim=1)
    every = torch.tensor(list(product(range(VOCABULARY), repeat=steps)))
    prompt = torch.from_numpy(PROMPTS[[1]]).expand(len(every), -1)
    whole = model(torch.cat([prompt, every], dim=1)).log_softmax(-1)[:, 4 : 4 + steps]
    brute = whole.gather(-1, every[..., None])[..., 0].sum(1)
    assert_close(score, brute.sort(descending=True).values, 1e-12)
    assert beams[0].tolist() == every[brute.argmax()].tolist()


@torch.no_grad()
def test_repeated_rows_are_independent_streams():
    model = make_model("swla")
    _, cache = stream(model, [0])
    many = mc_torch.take_rows(cache, [0, 0, 0])
    together, _ = model.extend(torch.from_numpy(NEXT), many)
    alone = [model.extend(torch.from_numpy(row[None]), cache)[0] for row in NEXT]
    assert_close(together, torch.cat(alone), 1e-12)


@torch.no_grad()
def test_dropping_rows_does_not_change_others():
    model = make_model("linear")
    _, cache = stream(model, [0, 1, 2])
    tokens = torch.from_numpy(NEXT)
    everyone, _ = model.extend(tokens, cache)
    rest, _ = model.extend(tokens[[0, 2]], mc_torch.take_rows(cache, [0, 2]))
    assert_close(rest, everyone[[0, 2]], 1e-12)


@pytest.mark.parametrize("package", [mc_jax, mc_torch])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 2], r"rows\[1\] = 2: must be in 0\.\.1"),
        ([-1], r"rows\[0\] = -1: must be in 0\.\.1"),
        ([0.5], "rows has dtype float64: must be an integer dtype"),
        ([True, False], "rows has dtype bool: must be an integer dtype"),
        ([[0, 1]], r"rows has shape \(1, 2\): must be \[r\]"),
    ],
    ids=str,
)
def test_rows_out_of_range_are_rejected(package, rows, message):
    config = replace(make_config("linear"), num_layers=1, mixers=("memory",))
    options = {"rngs": nnx.Rngs(0)} if package is mc_jax else {}
    cache = package.LanguageModel(config, **options).init_cache(2, 8)
    with pytest.raises(ValueError, match=message):
        package.take_rows(cache, rows)


def test_caches_support_copy_pickle_and_weights_only_load(tmp_path):
    model = make_model("titans")
    _, cache = stream(model, [0, 1])  # non-leaf tensors, detached by the copy
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=True)
    for other in (copy.deepcopy(cache), loaded, pickle.loads(pickle.dumps(cache))):
        assert [type(one) for one in other] == [type(one) for one in cache]
        with torch.no_grad():
            assert_close(dict(flatten(other)), dict(flatten(cache)), 0)
            tokens = torch.from_numpy(NEXT[:2])
            assert_close(model.extend(tokens, other)[0], model.extend(tokens, cache)[0], 0)
    layer = mc_jax.MemoryCachingLayer(make_config("titans").layer, rngs=nnx.Rngs(0))
    ours = layer.init_cache(2, 8)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(dict(flatten(other)), dict(flatten(ours)), 0)
