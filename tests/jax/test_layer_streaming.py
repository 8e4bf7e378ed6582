"""Streaming layers and models: capacity, padding, and storage of cached memories."""

from functools import cache as cached

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.cases import assert_close
from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_core.tree_utils import flatten
from mc_jax import LanguageModel, MemoryCachingLayer

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10


def layer(memory=None, aggregation="grm", dtype=jnp.float64, **options):
    """Return a layer, 13 tokens, and the layer's compiled methods as pure functions."""
    memory = memory or TitansConfig(expansion=1)
    options = {"segment_size": 4, "chunk_size": 3, "conv_width": 4} | options
    config = MCConfig(8, 2, memory, aggregation, **options)
    module = MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=dtype)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 13, 8)), dtype)
    return module, x, compiled(module, "extend"), compiled(module, "forward_with_cache")


def compiled(module, method):
    graphdef, state = nnx.split(module)

    @jax.jit
    def run(state, *given, **options):
        return getattr(nnx.merge(graphdef, state), method)(*given, **options)

    def call(*given, **options):
        return run(state, *given, **options)

    call.programs = run._cache_size
    return call


def test_extend_compiles_once_for_all_positions():
    """Past the capacity a compiled program returns NaN."""
    module, x, extend, forward = layer()
    cache, outputs = module.init_cache(2, 13), []
    for token in range(13):
        y, cache = extend(x[:, token : token + 1], cache)
        outputs.append(y)
    assert extend.programs() == 1
    assert_close(jnp.concatenate(outputs, axis=1), forward(x)[0], EXACT)
    y, _ = extend(x[:, :1], cache)
    assert np.isnan(y).all()
    assert extend.programs() == 1
    with pytest.raises(ValueError, match="advance position 13 to 14"):
        module.extend(x[:, :1], cache)


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        pytest.param(TitansConfig(expansion=1), "grm", "checkpoint", id="titans-grm-checkpoint"),
        pytest.param(SWLAConfig(), "ssc", "restart", id="swla-ssc-restart", marks=pytest.mark.slow),
    ],
)
def test_forward_cache_can_be_extended(memory, aggregation, mode):
    """`forward_with_cache` returns a full cache; `grow` increases its capacity."""
    module, x, extend, forward = layer(memory, aggregation, state_init_mode=mode)
    head, cache = forward(x[:, :7])
    with pytest.raises(
        ValueError, match=r"max_tokens = 7: the call would advance position 7 to 13"
    ):
        module.extend(x[:, 7:], cache)
    tail, cache = extend(x[:, 7:], module.grow(cache, 13))
    y, expected = forward(x)
    assert_close(jnp.concatenate([head, tail], axis=1), y, EXACT)
    assert_close(cache.segments, expected.segments, EXACT, name="segments")


def test_grow_preserves_cache_content():
    module, *_ = layer()
    numbers = np.random.default_rng(0)
    cache = jax.tree.map(
        lambda x: jnp.asarray(numbers.integers(1, 9, x.shape), x.dtype), module.init_cache(2, 6)
    )._replace(capacity=jnp.asarray(6, jnp.int32))
    grown = module.grow(cache, 40)
    assert grown.stored.length.shape == (2, 10)
    assert int(grown.capacity) == 40
    for (name, before), (_, after) in zip(flatten(cache), flatten(grown), strict=True):
        if name != "capacity":
            stored_dtype = after[:, : before.shape[1]] if name.startswith("stored") else after
            np.testing.assert_array_equal(stored_dtype, before, err_msg=name)
    with pytest.raises(ValueError, match="max_tokens = 5: must be >= 40"):
        module.grow(grown, 5)


def test_exceeding_capacity_raises_or_gives_nan():
    module, x, *_ = layer()
    cache = module.init_cache(2, 8)
    with pytest.raises(
        ValueError, match=r"max_tokens = 8: the call would advance position 0 to 13: call grow"
    ):
        module.extend(x, cache)
    cache = cache._replace(position=jnp.asarray([8, 3], jnp.int32))
    with pytest.raises(ValueError, match="advance position 8 to 9"):
        module.extend(x[:, :1], cache)


def test_non_streamable_configurations_are_rejected():
    module, x, *_ = layer(segmentation="logarithmic")
    with pytest.raises(ValueError, match=r"logarithmic.*'constant'"):
        module.init_cache(2, 8)
    other, *_ = layer()
    with pytest.raises(ValueError, match=r"logarithmic.*'constant'"):
        module.extend(x[:, :8], other.init_cache(2, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.init_cache(-1, 8), "batch = -1: must be >= 0"),
        (lambda m, x: m.init_cache(2, 0), "max_tokens = 0: must be >= 1"),
        (lambda m, x: m.extend(x, m.init_cache(3, 20)), r"must be \[b, t, 8\] with b = 3"),
        (lambda m, x: m.extend(x[..., :5], m.init_cache(2, 20)), r"must be \[b, t, 8\] with b = 2"),
    ],
)
def test_extend_rejects_invalid_calls(call, message):
    module, x, *_ = layer()
    with pytest.raises(ValueError, match=message):
        call(module, x)


def test_extend_does_not_modify_the_cache():
    """Two streams continue from one cache, which is unchanged."""
    module, x, extend, _ = layer(SWLAConfig(), "ssc")
    _, cache = extend(x[:, :6], module.init_cache(2, 13))
    before = [np.array(leaf) for _, leaf in flatten(cache)]
    first, _ = extend(x[:, 6:12], cache)
    other, _ = extend(-x[:, 6:12], cache)
    again, _ = extend(x[:, 6:12], cache)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    for (name, leaf), old in zip(flatten(cache), before, strict=True):
        np.testing.assert_array_equal(leaf, old, err_msg=name)


@pytest.mark.parametrize("aggregation", ["none", "residual", "mean"])
def test_summed_reads_store_no_slots(aggregation):
    module, *_ = layer(LinearConfig(), aggregation)
    bytes_ = [sum(x.nbytes for _, x in flatten(module.init_cache(1, n))) for n in (64, 65536)]
    assert bytes_[0] == bytes_[1]


# A model's prompts of 5, 9 and 1 tokens, then three tokens for each row.
PROMPTS, WIDTH = (5, 9, 1), 9
SIDES = ("left", "right", "both")
MODELS = {
    "titans-grm": (TitansConfig(expansion=1), "grm", "checkpoint"),
    "swla-ssc": (SWLAConfig(), "ssc", "restart"),
    "linear-mean": (LinearConfig(coefficients="token"), "mean", "checkpoint"),
    "dla-soup": (DLAConfig(expansion=1), "soup", "restart"),
    "dla-orthogonal": (DLAConfig(expansion=1, chunk_update="orthogonal"), "grm", "checkpoint"),
}
QUICK = ("linear-mean", "dla-orthogonal")


@cached
def model(name):
    """Return a model, tokens, and compiled programs of a full pass and of `extend`."""
    memory, aggregation, mode = MODELS[name]
    options = {"segment_size": 4, "chunk_size": 3, "conv_width": 4, "state_init_mode": mode}
    config = ModelConfig(17, 2, MCConfig(8, 2, memory, aggregation, **options))
    module = LanguageModel(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    tokens = np.random.default_rng(0).integers(17, size=(3, 12)).astype(np.int32)
    return module, tokens, compiled(module, "__call__"), compiled(module, "extend")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_padded_rows_match_single_rows(name):
    module, tokens, full_pass, extend = model(name)
    every = np.ones((3, WIDTH), bool)
    expected = np.asarray(full_pass(tokens, np.ones((3, 12), bool)))
    for side in SIDES:
        padding = np.ones((3, WIDTH), bool)
        prompts = np.full((3, WIDTH), 16, np.int32)
        for row, length in enumerate(PROMPTS):
            capacity = WIDTH - length
            first = {"left": capacity, "right": 0, "both": capacity // 2}[side]
            padding[row, first : first + length] = False
            prompts[row, first : first + length] = tokens[row, :length]
        y, cache = extend(prompts, module.init_cache(3, 12), every, padding=padding)
        for row, length in enumerate(PROMPTS):
            alone = expected[row, :length]
            place = f"{side}: prompt {row}"
            assert_close(np.asarray(y)[row][~padding[row]], alone, EXACT, name=place)
        assert cache[0].position.tolist() == list(PROMPTS)
        for step in range(3):
            # The row's next token, padded, so that all calls share one program.
            at = np.array(PROMPTS) + step
            padding = np.arange(WIDTH)[None] != np.array([[0], [4], [8]])
            token = np.where(padding, 16, tokens[np.arange(3), at][:, None]).astype(np.int32)
            y, cache = extend(token, cache, every, padding=padding)
            actual, alone = np.asarray(y)[~padding], expected[np.arange(3), at]
            assert_close(actual, alone, EXACT, name=f"{side}: step {step}")
    assert extend.programs() == 1


@pytest.mark.slow
def test_masked_tokens_take_positions():
    """Masked tokens take positions in segments, padding does not."""
    module, tokens, full_pass, extend = model("titans-grm")
    mask = np.random.default_rng(3).random((3, 12)) < 0.6
    cache, outputs = module.init_cache(3, 12), []
    for part in (slice(0, 5), slice(5, 12)):
        size = part.stop - part.start
        padding = np.broadcast_to(np.arange(WIDTH) >= size, (3, WIDTH))
        here = [np.pad(x[:, part], ((0, 0), (0, WIDTH - size))) for x in (tokens, mask)]
        y, cache = extend(here[0], cache, here[1], padding=padding)
        outputs.append(y[:, :size])
    assert_close(np.concatenate(outputs, axis=1), full_pass(tokens, mask), EXACT)
    assert cache[0].position.tolist() == [12] * 3


def test_values_at_padding_are_ignored():
    """NaN at padding has no effect."""
    module, x, extend, _ = layer(LinearConfig(coefficients="token"), "grm")
    padding = jnp.asarray(np.arange(13) < np.array([[5], [0]]))
    poisoned = jnp.where(padding[..., None], jnp.nan, x)
    y, cache = extend(poisoned, module.init_cache(2, 13), padding=padding)
    assert not np.asarray(y)[0, :5].any()
    assert all(np.isfinite(leaf).all() for _, leaf in flatten((y, cache)))


@pytest.mark.slow
def test_bfloat16_cached_memories():
    """Cached memories need half the bytes, with bfloat16 error; the online memory is exact."""
    module, x, extend, forward = layer(dtype=jnp.float32, conv_width=0)
    full_pass, expected = forward(x)
    for stored_dtype in ("bfloat16", "float32"):
        cache = module.init_cache(2, 13, cache_dtype=stored_dtype)
        assert {str(w.dtype) for w in cache.stored.weights} == {stored_dtype}
        y, cache = extend(x, cache)
        assert {str(w.dtype) for w in cache.stored.weights} == {stored_dtype}
        error = float(np.sqrt(np.mean((y - full_pass) ** 2) / np.mean(np.square(full_pass))))
        assert error < (1e-2 if stored_dtype == "bfloat16" else 1e-5)
        assert stored_dtype == "float32" or error > 1e-6  # bfloat16 rounds
        assert_close(cache.state, expected.state, 1e-5, name="state")


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["ssc", pytest.param("grm", marks=pytest.mark.slow)])
def test_offloaded_cached_memories(aggregation):
    """Offloaded memories give the same results and remain in host memory."""
    module, x, extend, _ = layer(aggregation=aggregation)

    def run(place):
        cache, outputs = module.init_cache(2, 13, cache_device=place), []
        for start in (0, 3, 6, 9):
            y, cache = extend(x[:, start : start + 3], cache)
            outputs.append(y)
        return np.concatenate(outputs, axis=1), cache

    (near, there), (far, here) = run("device"), run("host")
    assert_close(far, near, 1e-14, name="output")
    kinds = [{w.sharding.memory_kind for w in c.stored.weights} for c in (there, here)]
    assert kinds == [{"device"}, {"pinned_host"}]
    grown = module.grow(here, 40)
    assert {w.sharding.memory_kind for w in grown.stored.weights} == {"pinned_host"}
    assert_close(here.stored, there.stored, 1e-14, name="stored")
