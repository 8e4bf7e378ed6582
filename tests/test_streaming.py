"""A stream: any split of a sequence gives the outputs and the final cache of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import AGGREGATIONS, GATES, MAIN, MASKS, MEMORIES, MODES, assert_close, make_case
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from subject import arrays, run

from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_core.trees import flatten
from mc_jax import (
    LanguageModel,
    MemoryCachingLayer,
    extend,
    init_cache,
    memory_caching,
)

pytestmark = pytest.mark.usefixtures("float64", "strict")

EXACT = 1e-10
TOKENS = 14  # whole prompts, halves and single tokens; segments of 4, chunks of 3
SPLITS = ([14], [1] * 14, [6, 8], [5, 1, 1, 7], [3, 3, 3, 5], [2, 9, 3])


def stream(case, inputs, splits, cache=None):
    """Feed `memory_caching`'s inputs to `extend`, part by part."""
    cache = cache or init_cache(inputs["initial"], case.config, case.q.shape[0], case.tokens)
    outputs, start = [], 0
    for size in splits:
        part = slice(start, start + size)
        q, k, v, u, coefficients, mask = jax.tree.map(
            lambda x, part=part: x[:, part],
            (*(inputs[name] for name in "qkvu"), inputs["coefficients"], case.mask),
        )
        result = extend(
            q, k, v, u, inputs["initial"], coefficients, cache, case.config,
            mask=mask, norm=inputs["norm"],
        )  # fmt: skip
        outputs.append(result.output)
        cache, start = result.cache, start + size
    return jnp.concatenate(outputs, axis=1), cache


def assert_same_stream(case, splits):
    """Hold a stream to the whole pass: outputs, every leaf of the state, every cached memory."""
    output, cache = stream(case, arrays(case), splits)
    whole = run(case)
    assert_close(output, whole.output, EXACT, name="output")
    fields = ("total", "state", "pool_sum", "pool", "length", "slot", "position", "limit")
    for name in fields:
        assert_close(getattr(cache, name), getattr(whole.cache, name), EXACT, name=name)
    if cache.stored.length.shape[1]:
        assert_close(cache.segments, whole.cache.segments, EXACT, name="segments")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("memory", MAIN)
def test_a_split_stream_is_the_whole(memory, aggregation):
    number = MAIN.index(memory) + AGGREGATIONS.index(aggregation)
    case = make_case(
        memory,
        aggregation,
        tokens=TOKENS,
        mask=MASKS[number % len(MASKS)],
        state_init_mode=MODES[number % 2],
        gate=GATES[number // 2 % 2],
        seed=number,
    )
    for splits in (SPLITS[number % 2], SPLITS[2 + number % 4]):
        assert_same_stream(case, splits)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    memory=st.sampled_from(sorted(MEMORIES)),
    aggregation=st.sampled_from(AGGREGATIONS),
    mode=st.sampled_from(MODES),
    mask=st.sampled_from(MASKS),
    chunk=st.sampled_from([1, 3, 4, 9]),
    segment=st.sampled_from([1, 4, 5]),
    pooling=st.sampled_from(["mean", "sum"]),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 99),
    splits=st.lists(st.sampled_from([1, 2, 5, 7]), min_size=1, max_size=6),
)
def test_any_split_of_any_stream_is_the_whole(
    memory, aggregation, mode, mask, chunk, segment, pooling, gate, seed, splits
):
    case = make_case(
        memory,
        aggregation,
        tokens=sum(splits),
        mask=mask,
        seed=seed,
        state_init_mode=mode,
        chunk_size=chunk,
        segment_size=segment,
        pooling=pooling,
        gate=gate,
    )
    assert_same_stream(case, splits)


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cuts=st.sets(st.integers(1, TOKENS - 1), max_size=4))
def test_hypothesis_draws_the_splits(cuts):
    """One kind with everything that a cut can fall into: momentum, chunks, segments, a mask."""
    case = make_case("titans", "grm", tokens=TOKENS, mask="some", chunk_size=3)
    borders = [0, *sorted(cuts), TOKENS]
    assert_same_stream(case, np.diff(borders).tolist())


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("titans", "grm", "checkpoint"),
        ("dla", "soup", "restart"),
        ("swla", "ssc", "restart"),
        ("linear", "residual", "checkpoint"),
    ],
)
def test_gradients_flow_through_the_cache(memory, aggregation, mode):
    case = make_case(memory, aggregation, tokens=11, mask="some", state_init_mode=mode)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 2, case.v.shape[-1])))
    mask = jnp.asarray(case.mask)

    def whole(inputs):
        result = memory_caching(**inputs, config=case.config, mask=mask)
        return jnp.sum(result.output * weight)

    def parts(inputs):
        return jnp.sum(stream(case, inputs, [5, 6])[0] * weight)

    inputs = arrays(case)
    expected, actual = (jax.jit(jax.grad(f))(inputs) for f in (whole, parts))
    assert_close(actual, expected, 1e-9, name="gradient")


def layer(memory=None, aggregation="grm", dtype=jnp.float64, **options):
    memory = memory or TitansConfig(expansion=1)
    options = {"segment_size": 4, "chunk_size": 3, "conv_width": 4} | options
    config = MCConfig(8, 2, memory, aggregation, **options)
    module = MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=dtype)
    return module, np.random.default_rng(0).standard_normal((2, 13, 8))


def test_one_compilation_serves_all_positions():
    module, x = layer()
    graphdef, state = nnx.split(module)
    traces = []

    @jax.jit
    def step(state, x, cache):
        traces.append(x.shape)
        return nnx.merge(graphdef, state).extend(x, cache)

    cache, outputs = module.init_cache(2, 13), []
    for token in range(13):
        y, cache = step(state, jnp.asarray(x[:, token : token + 1]), cache)
        outputs.append(y)
    assert traces == [(2, 1, 8)]
    assert_close(jnp.concatenate(outputs, axis=1), module(jnp.asarray(x)), EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_goes_on_as_a_stream(mode):
    """What `forward_with_cache` gives is a cache without room; `grow` makes some."""
    module, x = layer(state_init_mode=mode)
    x = jnp.asarray(x)
    head, cache = module.forward_with_cache(x[:, :7])
    with pytest.raises(ValueError, match=r"max_tokens = 7, and position 7 would go to 13"):
        module.extend(x[:, 7:], cache)
    tail, cache = module.extend(x[:, 7:], module.grow(cache, 13))
    assert_close(jnp.concatenate([head, tail], axis=1), module(x), EXACT)
    assert_close(cache.segments, module.forward_with_cache(x)[1].segments, EXACT, name="segments")


def test_growing_keeps_the_content():
    module, x = layer()
    _, cache = module.extend(jnp.asarray(x[:, :6]), module.init_cache(2, 6))
    grown = module.grow(cache, 40)
    assert grown.stored.length.shape == (2, 10)
    assert int(grown.limit) == 40
    for (name, before), (_, after) in zip(flatten(cache), flatten(grown), strict=True):
        if name != "limit":
            kept = after[:, : before.shape[1]] if name.startswith("stored") else after
            np.testing.assert_array_equal(kept, before, err_msg=name)
    with pytest.raises(ValueError, match="max_tokens = 5: must be >= 40"):
        module.grow(grown, 5)


def test_no_room():
    module, x = layer()
    x, cache = jnp.asarray(x), module.init_cache(2, 8)
    with pytest.raises(ValueError, match=r"max_tokens = 8, and position 0 would go to 13: grow"):
        module.extend(x, cache)
    _, cache = module.extend(x[:, :8], cache)
    with pytest.raises(ValueError, match="position 8 would go to 9"):
        module.extend(x[:, :1], cache)
    graphdef, state = nnx.split(module)
    step = jax.jit(lambda state, x, cache: nnx.merge(graphdef, state).extend(x, cache))
    y, _ = step(state, x[:, :1], cache)
    assert np.isnan(y).all()  # a compiled step cannot raise, and does not go on in silence


def test_what_cannot_stream():
    module, x = layer(segmentation="logarithmic")
    with pytest.raises(ValueError, match=r"logarithmic.*'constant'"):
        module.init_cache(2, 8)
    with pytest.raises(ValueError, match=r"logarithmic.*'constant'"):
        module.extend(jnp.asarray(x), module.forward_with_cache(jnp.asarray(x))[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.init_cache(-1, 8), "batch = -1: must be >= 0"),
        (lambda m, x: m.init_cache(2, 0), "max_tokens = 0: must be >= 1"),
        (lambda m, x: m.extend(x, m.init_cache(3, 20)), r"must be \[b, t, 8\], b = 3"),
        (lambda m, x: m.extend(x[..., :5], m.init_cache(2, 20)), r"must be \[b, t, 8\], b = 2"),
    ],
)
def test_bad_calls(call, message):
    module, x = layer()
    with pytest.raises(ValueError, match=message):
        call(module, jnp.asarray(x))


def test_a_cache_does_not_change():
    """Two streams go on from one cache, and the cache is as it was."""
    module, x = layer(SWLAConfig(), "ssc")
    x = jnp.asarray(x)
    _, cache = module.extend(x[:, :6], module.init_cache(2, 13))
    before = [np.array(leaf) for _, leaf in flatten(cache)]
    first, _ = module.extend(x[:, 6:], cache)
    other, _ = module.extend(-x[:, 6:], cache)
    again, _ = module.extend(x[:, 6:], cache)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    for (name, leaf), old in zip(flatten(cache), before, strict=True):
        np.testing.assert_array_equal(leaf, old, err_msg=name)


@pytest.mark.parametrize("aggregation", ["none", "residual", "mean"])
def test_memories_that_are_never_read_alone_are_not_kept(aggregation):
    module, _ = layer(LinearConfig(), aggregation)
    bytes_ = [sum(x.nbytes for _, x in flatten(module.init_cache(1, n))) for n in (64, 65536)]
    assert bytes_[0] == bytes_[1]


def model(memory, aggregation, **options):
    options = {"segment_size": 4, "chunk_size": 3, "conv_width": 4} | options
    config = ModelConfig(17, 2, MCConfig(8, 2, memory, aggregation, **options))
    module = LanguageModel(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    return module, np.random.default_rng(0).integers(17, size=(3, 12)).astype(np.int32)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        (TitansConfig(expansion=1), "grm", "checkpoint"),
        (SWLAConfig(), "ssc", "restart"),
        (LinearConfig(coefficients="token"), "mean", "checkpoint"),
        (DLAConfig(expansion=1), "soup", "restart"),
    ],
    ids=["titans-grm", "swla-ssc", "linear-mean", "dla-soup"],
)
def test_padded_rows_are_what_they_are_alone(memory, aggregation, mode, side):
    """Prompts of 5, 9 and 1 tokens in one batch, then three tokens for each row."""
    module, tokens = model(memory, aggregation, state_init_mode=mode)
    lengths, width = (5, 9, 1), 9
    padding = np.zeros((3, width), bool)
    prompts = np.full((3, width), 16, np.int32)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        padding[row] = True
        padding[row, first : first + length] = False
        prompts[row, first : first + length] = tokens[row, :length]
    y, cache = module.extend(
        jnp.asarray(prompts), module.init_cache(3, 12), padding=jnp.asarray(padding)
    )
    whole = np.asarray(module(jnp.asarray(tokens)))
    for row, length in enumerate(lengths):
        alone = whole[row, :length]
        assert_close(np.asarray(y)[row][~padding[row]], alone, EXACT, name=f"prompt {row}")
    assert cache[0].position.tolist() == list(lengths)
    for step in range(3):
        token = np.stack([tokens[row, n + step] for row, n in enumerate(lengths)])[:, None]
        y, cache = module.extend(jnp.asarray(token), cache)
        alone = np.stack([whole[row, n + step] for row, n in enumerate(lengths)])[:, None]
        assert_close(y, alone, EXACT, name=f"step {step}")


def test_masked_tokens_take_their_positions():
    """`mask` is the equations' mask, `padding` is not: only the latter moves no segment."""
    module, tokens = model(TitansConfig(expansion=1), "grm")
    tokens = jnp.asarray(tokens)
    mask = jnp.asarray(np.random.default_rng(3).random((3, 12)) < 0.6)
    first, cache = module.extend(tokens[:, :5], module.init_cache(3, 12), mask[:, :5])
    second, cache = module.extend(tokens[:, 5:], cache, mask[:, 5:])
    assert_close(jnp.concatenate([first, second], axis=1), module(tokens, mask), EXACT)
    assert cache[0].position.tolist() == [12] * 3


def test_nothing_at_padding_matters():
    """Where a row has no token, NaN may stand."""
    module, x = layer(LinearConfig(coefficients="token"), "grm")
    padding = jnp.asarray(np.arange(13) < np.array([[5], [0]]))
    poisoned = jnp.where(padding[..., None], jnp.nan, jnp.asarray(x))
    y, cache = module.extend(poisoned, module.init_cache(2, 13), padding=padding)
    assert not np.asarray(y)[0, :5].any()
    assert all(np.isfinite(leaf).all() for _, leaf in flatten((y, cache)))


@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_cached_memories_may_be_stored_short(kept):
    """Half the bytes, at the error of their dtype; the online memory stays exact."""
    module, x = layer(dtype=jnp.float32, conv_width=0)
    x = jnp.asarray(x, jnp.float32)
    cache = module.init_cache(2, 13, cache_dtype=kept)
    assert {str(w.dtype) for w in cache.stored.weights} == {kept}
    y, cache = module.extend(x, cache)
    assert {str(w.dtype) for w in cache.stored.weights} == {kept}
    error = float(jnp.sqrt(jnp.mean((y - module(x)) ** 2) / jnp.mean(module(x) ** 2)))
    assert error < (1e-2 if kept == "bfloat16" else 1e-5)
    assert kept == "float32" or error > 1e-6  # it was rounded indeed
    exact = module.forward_with_cache(x)[1].state
    assert_close(cache.state, exact, 1e-5, name="state")


@pytest.mark.parametrize("aggregation", ["ssc", "grm"])
def test_cached_memories_may_lie_in_the_hosts_memory(aggregation):
    """They give what they give on the device, and stay where they lie."""
    module, x = layer(aggregation=aggregation)
    graphdef, state = nnx.split(module)
    step = jax.jit(lambda state, x, cache: nnx.merge(graphdef, state).extend(x, cache))

    def run(place):
        cache, outputs = module.init_cache(2, 13, cache_device=place), []
        for part in (slice(0, 9), slice(9, 10), slice(10, 11), slice(11, 12), slice(12, 13)):
            y, cache = step(state, jnp.asarray(x[:, part]), cache)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), cache

    (near, there), (far, here) = run("device"), run("host")
    assert_close(far, near, 1e-14, name="output")
    kinds = [{w.sharding.memory_kind for w in c.stored.weights} for c in (there, here)]
    assert kinds == [{"device"}, {"pinned_host"}]
    grown = module.grow(here, 40)
    assert {w.sharding.memory_kind for w in grown.stored.weights} == {"pinned_host"}
    assert_close(here.stored, there.stored, 1e-14, name="stored")
