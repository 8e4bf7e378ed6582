"""Layers with `segmentation="fenwick"` in both packages: streams, caches, files and inspection."""

import dataclasses
from dataclasses import dataclass
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
from helpers.oracle_buckets import buckets_of
from mc_core import (
    LinearConfig,
    MCConfig,
    MemoryConfig,
    SWLAConfig,
    TitansConfig,
    make_plan,
    register_memory,
)
from mc_core.cache_checks import NO_SLOT
from mc_core.memories import MEMORIES
from mc_core.tree_utils import flatten
from parity.weights import load_torch, to_torch
from train.evaluation.inspection_plots import draw_layer

pytestmark = pytest.mark.usefixtures("float64", "strict")

TOKENS = 21
OPTIONS: dict[str, Any] = {"segmentation": "fenwick", "segment_size": 3, "chunk_size": 2}
LEARNED = {"gate_bias": 0.5, "softmax_temperature": "learned", "pool_norm": "l2"}
RESTART = MCConfig(
    8, 2, SWLAConfig(learn_initial=True), "grm", state_init_mode="restart", conv_width=3, **OPTIONS
)
SPARSE = MCConfig(8, 2, TitansConfig(expansion=1), "ssc", ssc_top_k=1, **LEARNED, **OPTIONS)
MEAN = MCConfig(
    8, 2, LinearConfig(coefficients="token"), "mean", state_init_mode="restart", **OPTIONS
)
# JAX compiles every operation of a layer that is not compiled as a whole: mostly slow tests.
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        pytest.param(RESTART, marks=pytest.mark.slow),
        pytest.param(SPARSE, marks=pytest.mark.slow),
        MEAN,
    ],
    ids=["swla", "titans", "mean"],
)
PACKAGES = pytest.mark.parametrize(
    "package", [pytest.param(mc_jax, marks=pytest.mark.slow), mc_torch], ids=["jax", "torch"]
)


def build(package: Any, config: Any) -> Any:
    """Build a layer in float64, with the same weights in both packages."""
    left = mc_jax.MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    if package is mc_jax:
        return left
    right = mc_torch.MemoryCachingLayer(config, dtype=torch.float64)
    load_torch(right, to_torch(mc_jax.pretrained.get_weights(left)))
    return right


def tokens(package: Any, batch: int = 2) -> Any:
    x = np.random.default_rng(0).standard_normal((batch, TOKENS, 8))
    return jnp.asarray(x) if package is mc_jax else torch.tensor(x)


def array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def arrays(tree: Any) -> Any:
    return {name: array(x) for name, x in flatten(tree)}


def stream(module: Any, x: Any, parts: Any, cache: Any) -> tuple[np.ndarray, Any]:
    outputs, start = [], 0
    for part in parts:
        y, cache = module.extend(x[:, start : start + part], cache)
        outputs.append(array(y))
        start += part
    return np.concatenate(outputs, axis=1), cache


@pytest.mark.slow
@CONFIGS
def test_layers_agree_and_stream(config):
    """A full pass, and a stream that grows from 5 to 21 tokens."""
    expected = None
    for package in (mc_torch, mc_jax):
        module, x = build(package, config), tokens(package)
        y, full = module.forward_with_cache(x)
        expected = array(y) if expected is None else expected
        assert_close(array(y), expected, 1e-10)
        first, cache = stream(module, x, (4, 1), module.init_cache(2, 5))
        cache = module.grow(cache, TOKENS)
        second, cache = stream(module, x[:, 5:], (8, 8), cache)
        assert_close(np.concatenate([first, second], axis=1), expected, 1e-10)
        assert_close(arrays(cache), arrays(full), 1e-10)


@PACKAGES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_match_single_rows(package, side):
    """Rows with 21, 10 and 0 tokens, then 5 more in each: rows are at different positions."""
    module, x, lengths = build(package, RESTART), tokens(package, 3), np.array([21, 10, 0])
    place = np.arange(TOKENS)
    padding = place >= lengths[:, None] if side == "right" else place < TOKENS - lengths[:, None]
    given = jnp.asarray(padding) if package is mc_jax else torch.tensor(padding)
    y, cache = module.extend(x, module.init_cache(3, 30), padding=given)
    after, cache = module.extend(x[:, :5], cache)
    for row in range(3):
        one, real = slice(row, row + 1), ~padding[row]
        parts = np.concatenate([array(x)[one][:, real], array(x)[one, :5]], axis=1)
        parts = jnp.asarray(parts) if package is mc_jax else torch.tensor(parts)
        alone, expected = module.extend(parts, module.init_cache(1, 30))
        actual = np.concatenate([array(y)[one][:, real], array(after)[one]], axis=1)
        assert_close(actual, array(alone), 1e-10)
        assert_close(arrays(cache.take([row])), arrays(expected), 1e-10)


@PACKAGES
@pytest.mark.parametrize("config", [RESTART, SPARSE], ids=["swla", "titans"])
def test_offloaded_buckets(package, config):
    module, x = build(package, config), tokens(package)
    results = []
    for place in ("device", "host"):
        cache = module.init_cache(2, TOKENS, cache_device=place)
        results.append(stream(module, x, (7, 7, 1, 6), cache))
    (near, there), (far, here) = results
    assert_close(far, near, 1e-14, name="output")
    assert_close(arrays(here), arrays(there), 1e-14)
    if package is mc_jax:
        kinds = [{w.sharding.memory_kind for w in c.stored.weights} for c in (there, here)]
        assert kinds == [{"device"}, {"pinned_host"}]


@CONFIGS
@pytest.mark.parametrize(
    ("writer", "reader"),
    [pytest.param(mc_jax, mc_torch, marks=pytest.mark.slow), (mc_torch, mc_jax)],
)
def test_saved_cache_continues_in_other_package(tmp_path, writer, reader, config):
    path = tmp_path / "stream.safetensors"
    module = build(writer, config)
    cache = module.extend(tokens(writer)[:, :10], module.init_cache(2, TOKENS))[1]
    writer.save_cache(path, cache, config)
    expected, _ = module.extend(tokens(writer)[:, 10:], cache)
    other = build(reader, config)
    loaded = reader.load_cache(path, other)
    assert_close(arrays(loaded), arrays(cache), 1e-14)
    y, _ = other.extend(tokens(reader)[:, 10:], loaded)
    np.testing.assert_allclose(array(y), array(expected), rtol=0, atol=1e-12)
    constant = dataclasses.replace(config, segmentation="constant")
    with pytest.raises(ValueError, match=r"segmentation = 'constant': must be 'fenwick'"):
        reader.load_cache(path, build(reader, constant))


@PACKAGES
@pytest.mark.parametrize(
    "config",
    [RESTART, pytest.param(SPARSE, marks=pytest.mark.slow)],
    ids=["swla", "titans"],
)
def test_inspect_shows_buckets(package, config):
    """Gates, norms, lengths and readers by bucket; recall by segment."""
    module, x = build(package, config), tokens(package)
    _, trace = module.inspect(x)
    _, cache = module.forward_with_cache(x)
    plan = make_plan(TOKENS, config)
    gates = array(trace.gates)
    assert gates.shape == (2, TOKENS, 2, 4)
    assert array(trace.cached_count).tolist() == [(t // 3).bit_count() for t in range(TOKENS)]
    assert plan.memory_names == ("bucket of 1", "bucket of 2", "bucket of 4")
    assert plan.readers.tolist() == [9, 9, 9]
    counts = array(trace.read_count)
    np.testing.assert_array_equal(counts, (gates[..., :-1] > 0).sum(axis=1).swapaxes(1, 2))
    if not config.rule.sparse:
        assert (counts == plan.readers[:, None]).all()
    squares = sum((array(w) ** 2).sum((-2, -1)) for w in cache.segments.weights)
    assert_close(array(trace.segment_norm), np.sqrt(squares), 1e-10)
    assert array(trace.segment_length).tolist() == [[3, 6, 12]] * 2
    assert array(trace.recall).shape == (2, 7, 2)
    layer = {name: array(x) for name, x in trace._asdict().items() if x is not None}
    layer |= {"recall": array(trace.recall)}
    by_token = ("token_index", "segment_index", "cached_count")
    layer = {name: x if name in by_token else x[0] for name, x in layer.items()}
    assert draw_layer(layer, plan, "layer 0", config.aggregation).startswith(b"\x89PNG")


@PACKAGES
def test_stream_state_has_no_online_slot(package):
    module = build(package, RESTART)
    cache = module.init_cache(2, 64)
    assert cache.stored.length.shape == (2, (22).bit_length())
    assert (array(cache.slot) == NO_SLOT).all()
    assert cache.segments is cache.stored


def test_oracle_buckets_are_binary_digits():
    config = MCConfig(8, 2, **OPTIONS)
    for blocks in range(40):
        found = [1 << bucket.exponent for bucket in buckets_of([_BLOCK] * blocks, 4, config)]
        assert sum(found) == blocks
        assert found == sorted(set(found), reverse=True)


class _Block:
    memory, keys, decay = None, (), 1.0


_BLOCK: Any = _Block()


@dataclass(frozen=True)
class DecayedConfig(MemoryConfig):
    """A matrix memory from outside the packages."""

    kind = "decayed_sum"
    description = "matrix, decayed sum"
    ranges = {"step": (0.0, 2.0), "retention": (0.0, 1.0)}  # noqa: RUF012 - read only
    decay_only_transition = True

    coefficients: str = "token"
    step: float = 1.0
    retention: float = 0.9


@pytest.fixture
def custom(monkeypatch):
    monkeypatch.setattr("mc_core.memories.MEMORIES", MEMORIES)
    register_memory(DecayedConfig)
    mc_jax.register_backend(DecayedConfig.kind)(type("JaxSum", (mc_jax.MatrixMemory,), {}))
    mc_torch.register_backend(DecayedConfig.kind)(type("TorchSum", (mc_torch.MatrixMemory,), {}))
    yield
    del MEMORIES[DecayedConfig.kind]
    for package in (mc_jax, mc_torch):
        del package.backends.base.BACKENDS[DecayedConfig.kind]


@pytest.mark.slow
@pytest.mark.usefixtures("custom")
def test_custom_memory_with_decay_only_transition():
    """It equals `linear` with learned coefficients, in `restart` mode."""
    options = {"state_init_mode": "restart", **OPTIONS}
    outputs = []
    for memory in (DecayedConfig(), LinearConfig(coefficients="token", retention=0.9)):
        for package in (mc_jax, mc_torch):
            module = build(package, MCConfig(8, 2, memory, "grm", **options))
            outputs.append(array(module(tokens(package))))
    for output in outputs[1:]:
        assert_close(output, outputs[0], 1e-10)


def test_dependent_writes_cannot_declare_decay_only_transitions():
    class Wrong(DecayedConfig):
        kind = "wrong"
        gradient_uses_weights = True

    with pytest.raises(ValueError, match="sets decay_only_transition: gradient_uses_weights"):
        register_memory(dataclass(frozen=True)(Wrong))


@pytest.mark.slow
def test_jax_step_compiles_once():
    """One program for all positions of a stream."""
    module, x = build(mc_jax, RESTART), tokens(mc_jax)
    graph, state = nnx.split(module)
    traces = []

    @jax.jit
    def step(state, x, cache):
        traces.append(1)
        return nnx.merge(graph, state).extend(x, cache)

    cache, outputs = module.init_cache(2, TOKENS), []
    for t in range(TOKENS):
        y, cache = step(state, x[:, t : t + 1], cache)
        outputs.append(y)
    assert len(traces) == 1
    assert_close(np.concatenate(outputs, axis=1), array(module(x)), 1e-10)
