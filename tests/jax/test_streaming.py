"""Streaming: any split of a sequence gives the outputs and final cache of a full pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from helpers import torch_calls
from helpers.cases import (
    AGGREGATIONS,
    GATES,
    KINDS,
    MASKS,
    MEMORIES,
    MODES,
    assert_close,
    make_case,
)
from helpers.covering_arrays import numbered, pairwise
from helpers.jax_calls import arrays
from mc_jax import Coefficients, extend, init_cache, memory_caching

pytestmark = pytest.mark.usefixtures("float64", "strict")

EXACT = 1e-10
TOKENS = 14  # whole prompts, halves and single tokens; segments of 4, chunks of 3
SPLITS = ([1] * 14, [6, 8], [5, 1, 1, 7], [3, 3, 3, 5], [2, 9, 3], [14])
CASES = pairwise(
    memory=KINDS,
    aggregation=AGGREGATIONS,
    mask=MASKS,
    state_init_mode=MODES,
    gate=GATES,
    pooling=("mean", "sum"),
    chunk_size=(3, 1, 4, 9),
    segment_size=(4, 1, 5),
    gate_bias=(None, 1.0),
    pool_norm=("none", "l2"),
)


@partial(jax.jit, static_argnames="config")
def extend_compiled(tokens, weights, cache, count, config):
    """Extend a stream by the first `count` tokens."""
    *inputs, coefficients, mask = tokens
    initial, norm, gate_bias = weights
    options = {"config": config, "mask": mask, "count": count, "norm": norm}
    return extend(*inputs, initial, coefficients, cache, gate_bias=gate_bias, **options)


def stream(case, splits):
    """Stream a case in parts of the same shape, which share one program.

    Padding contains NaN, and True in the mask.
    """
    inputs, rows = arrays(case), len(case.q)
    width = max(TOKENS, *splits)
    tokens = (
        *(getattr(case, name) for name in "qkvu"),
        Coefficients(*case.coefficients),
        case.mask,
    )

    def part(x, start, size):
        rest = np.full((rows, width - size, *x.shape[2:]), x.dtype == bool or np.nan, x.dtype)
        return np.concatenate([x[:, start : start + size], rest], axis=1)

    cache = init_cache(inputs["initial"], case.config, rows, case.tokens)
    weights = inputs["initial"], inputs["norm"], inputs["gate_bias"]
    outputs, start = [], 0
    for size in splits:
        inputs_of_part = jax.tree.map(partial(part, start=start, size=size), tokens)
        count = np.full(rows, size, np.int32)
        result = extend_compiled(inputs_of_part, weights, cache, count, case.config)
        output = np.asarray(result.output)
        assert not output[:, size:].any()
        outputs.append(output[:, :size])
        cache, start = result.cache, start + size
    return np.concatenate(outputs, axis=1), cache


def assert_same_stream(case, expected, splits):
    """Compare outputs, state and cached memories of a stream with a full pass.

    The full pass runs in PyTorch, which needs no compilation.
    """
    output, cache = stream(case, splits)
    assert_close(output, expected.output, EXACT, name="output")
    fields = ("total", "state", "pool_sum", "pool", "length", "slot", "position", "capacity")
    for name in fields:
        assert_close(getattr(cache, name), getattr(expected.cache, name), EXACT, name=name)
    if cache.stored.length.shape[1]:
        assert_close(cache.segments, expected.cache.segments, EXACT, name="segments")


@pytest.mark.parametrize("number", numbered(CASES, len(AGGREGATIONS), {4, 12, 14, 19, 23, 24, 28}))
def test_split_stream_matches_full_pass(number):
    """Token by token, in one of the splits above, and in two random splits."""
    case, draw = (
        make_case(**CASES[number], tokens=TOKENS, seed=number),
        np.random.default_rng(number),
    )
    expected = torch_calls.run(case)
    random_splits = [
        np.diff([0, *sorted(draw.permutation(TOKENS - 1)[:cuts] + 1), TOKENS]).tolist()
        for cuts in draw.integers(1, 7, 2)
    ]
    for splits in (SPLITS[0], SPLITS[1 + number % 5], *random_splits):
        assert_same_stream(case, expected, splits)


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("delta", "grm", "checkpoint"),
        ("titans-last-initial", "soup", "restart"),
        ("titans-orthogonal", "grm", "checkpoint"),
        ("dla-orthogonal", "soup", "restart"),
    ],
)
def test_stream_of_options_matches_full_pass(memory, aggregation, mode):
    case = make_case(memory, aggregation, tokens=TOKENS, mask="some", state_init_mode=mode)
    expected = torch_calls.run(case)
    for splits in (SPLITS[0], SPLITS[2]):
        assert_same_stream(case, expected, splits)


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
def test_split_stream_matches_full_pass_on_large_grid(
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
    assert_same_stream(case, torch_calls.run(case), splits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("titans", "grm", "checkpoint"),
        ("dla", "soup", "restart"),
        ("swla", "ssc", "restart"),
        ("linear", "residual", "checkpoint"),
    ],
)
def test_gradients_through_cache_match_full_pass(memory, aggregation, mode):
    """Gradients of two calls match a full pass in PyTorch."""
    case = make_case(memory, aggregation, tokens=11, mask="some", state_init_mode=mode)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 2, case.v.shape[-1])))
    mask = jnp.asarray(case.mask)

    def full_pass_loss(inputs):
        result = memory_caching(**inputs, config=case.config, mask=mask)
        return jnp.sum(result.output * weight)

    def stream_loss(inputs):
        cache, total = init_cache(inputs["initial"], case.config, 2, 11), 0.0
        names = (*"qkvu", "coefficients")
        for part in (slice(0, 5), slice(5, 11)):
            inputs_of_part = {
                name: jax.tree.map(lambda x, p=part: x[:, p], inputs[name]) for name in names
            }
            result = extend(
                **inputs | inputs_of_part, cache=cache, config=case.config, mask=mask[:, part]
            )
            cache, total = result.cache, total + jnp.sum(result.output * weight[:, part])
        return total

    inputs = arrays(case)
    expected, actual = (jax.jit(jax.grad(f))(inputs) for f in (full_pass_loss, stream_loss))
    assert_close(actual, expected, 1e-9, name="gradient")
