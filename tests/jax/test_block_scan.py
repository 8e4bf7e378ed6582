"""Scanned and unrolled blocks: the same function, gradients and streams, and a smaller program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_core import LinearConfig, MCConfig, ModelConfig
from mc_core.config import MIXERS
from mc_core.memories import MEMORIES
from mc_jax import LanguageModel

LAYER = MCConfig(8, 2, LinearConfig(), "grm", segment_size=4, chunk_size=2, conv_width=2)
CONFIG = ModelConfig(
    7, 5, LAYER, ffn_width=8, remat=True, scan_layers=True, num_levels=5, attention_window=3
)
TOKENS = np.random.default_rng(0).integers(7, size=(2, 9)).astype(np.int32)
LABELS = np.random.default_rng(1).integers(7, size=(2, 9)).astype(np.int32)


def make_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)


def program(config: ModelConfig):
    """Return the function from parameters to the loss, and random parameters."""
    graphdef, params = nnx.split(make_model(config))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(2)
    params = jax.tree.unflatten(tree, [x + 0.1 * rng.standard_normal(x.shape) for x in leaves])

    def loss(params):
        return nnx.merge(graphdef, params).score(TOKENS, LABELS).losses.mean()

    return loss, params


def scans(function, *args) -> list[int]:
    """Return the lengths of the scans whose carry is the input of a block."""
    eqns = jax.make_jaxpr(function)(*args).jaxpr.eqns
    return [
        eqn.params["length"]
        for eqn in eqns
        if eqn.primitive.name == "scan" and [v.aval.shape for v in eqn.outvars] == [(2, 9, 8)]
    ]


def assert_same_training(config: ModelConfig) -> None:
    loss, params = program(config)
    unrolled, other = program(dataclasses.replace(config, scan_layers=False))
    assert jax.tree.structure(params) == jax.tree.structure(other)
    assert scans(loss, params) == [config.num_layers // len(config.mixers)]
    assert scans(unrolled, params) == []
    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, unrolled))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("float64", "strict")
def test_patterns_with_a_remainder():
    """Two repetitions of two mixers, and a block of its own."""
    assert_same_training(dataclasses.replace(CONFIG, mixers=("memory", "attention")))


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "strict")
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("other", [*MIXERS, None])
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_and_pattern(memory, other, remat):
    layer = dataclasses.replace(LAYER, memory=MEMORIES[memory]())
    mixers = ("memory",) if other is None else ("memory", other)
    config = dataclasses.replace(CONFIG, layer=layer, mixers=mixers, remat=remat)
    assert_same_training(config)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "mixers",
    [("memory",), pytest.param(("memory", "window", "log_linear"), marks=pytest.mark.slow)],
)
def test_streams_equal_the_scanned_pass(mixers):
    model = make_model(dataclasses.replace(CONFIG, num_layers=2 * len(mixers), mixers=mixers))
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS))
    extend = jax.jit(lambda params, *args: nnx.merge(graphdef, params).extend(*args))
    first, cache = extend(params, TOKENS[:, :4], model.init_cache(2, 9))
    last, _ = extend(params, TOKENS[:, 4:], cache)
    streamed = np.concatenate([first, last], axis=1)
    np.testing.assert_allclose(streamed, run(params), rtol=1e-10, atol=1e-12)


class Wrapped(nnx.Module):
    """A block with a factor."""

    def __init__(self, block):
        self.block, self.factor = block, 2.0

    def __call__(self, x, mask):
        return self.factor * self.block(x, mask)


class Noisy(Wrapped):
    """A block with a random stream."""

    def __init__(self, block):
        super().__init__(block)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("wrap", "indices"), [(Wrapped, [2]), (Noisy, range(4))])
def test_blocks_that_cannot_be_stacked_are_not_scanned(wrap, indices):
    model = LanguageModel(dataclasses.replace(CONFIG, num_layers=4), rngs=nnx.Rngs(0))

    def lengths():
        graphdef, state = nnx.split(model)
        return scans(lambda state: nnx.merge(graphdef, state)(TOKENS), state)

    assert lengths() == [4]
    for i in indices:
        model.blocks[i] = wrap(model.blocks[i])
    assert lengths() == []


def test_default_depends_on_the_number_of_repetitions():
    def scanned(layers, mixers=("memory",), scan_layers=None):
        config = ModelConfig(7, layers, LAYER, mixers=mixers, scan_layers=scan_layers)
        return config.scans_layers

    assert [scanned(n) for n in (3, 4)] == [False, True]
    assert [scanned(n, ("memory", "attention")) for n in (7, 8)] == [False, True]
    assert [scanned(2, scan_layers=True), scanned(9, scan_layers=False)] == [True, False]
