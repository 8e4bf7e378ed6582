"""`mc_torch` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

PyTorch needs no compilation, so random searches and full grids are here; `test_fenwick` has fewer
cases of `mc_jax`.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cases import AGGREGATIONS, KINDS, MEMORIES, assert_close
from helpers.fenwick_cases import (
    LAYOUTS,
    STARTS,
    assert_matches_oracle,
    make_fenwick_case,
    random_fenwick_cases,
    with_options,
)
from helpers.recurrence_cases import EXACT, GRADIENT, METHODS, examples
from helpers.torch_calls import arrays, call, gradients, leaves, projected, run
from helpers.torch_layers import draw, make_layer
from mc_core import MCConfig
from mc_torch import extend, grow, init_cache, memory_caching
from mc_torch.numerics import tree_map

# Every memory with one aggregation; the other pairs are slow tests.
PAIRS = [(start, AGGREGATIONS[i % 6]) for i, start in enumerate(STARTS)]
CASES = with_options(PAIRS)
QUICK = pytest.mark.parametrize(("memory", "aggregation", "options"), CASES)
# Other variants of the same kinds are slow tests.
FEWER = pytest.mark.parametrize(
    ("memory", "aggregation", "options"),
    [
        pytest.param(
            *case.values,
            id=case.id,
            marks=()
            if case.values[0]
            in (*KINDS, "linear-normalized", "titans-norm", "delta", "titans-last-initial")
            else pytest.mark.slow,
        )
        for case in CASES
    ],
)
ALL = pytest.mark.parametrize(
    ("memory", "aggregation", "options"), with_options(product(STARTS, AGGREGATIONS))
)


def check(case):
    results = [run(case, method) for method in METHODS]
    for result in results:
        assert_matches_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@QUICK
def test_both_methods_match_oracle(memory, aggregation, options):
    check(make_fenwick_case(memory, aggregation, **options))


@pytest.mark.slow
@ALL
def test_both_methods_match_oracle_for_all_pairs(memory, aggregation, options):
    check(make_fenwick_case(memory, aggregation, **options))


@given(case=random_fenwick_cases())
@settings(examples, max_examples=30)
def test_both_methods_match_oracle_on_random_cases(case):
    check(case)


@pytest.mark.slow
@given(case=random_fenwick_cases())
@settings(examples, max_examples=300)
def test_both_methods_match_oracle_on_large_grid(case):
    check(case)


@pytest.mark.parametrize(
    ("memory", "mode"), [("swla", "restart"), ("titans", "checkpoint"), ("delta", "checkpoint")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_oracle(layout, memory, mode):
    check(make_fenwick_case(memory, "grm", state_init_mode=mode, **LAYOUTS[layout]))


def check_gradients(memory, aggregation, options):
    case = make_fenwick_case(memory, aggregation, **options)
    results = [gradients(case, method) for method in METHODS]
    assert_close(*results, GRADIENT, name="gradient")
    for name in ("q", "k", "v", *(["gate_bias"] if case.gate_bias is not None else [])):
        assert np.abs(results[0][name]).max() > 1e-3, f"no gradient reaches {name}"


@FEWER
def test_chunked_gradients_match_recurrent(memory, aggregation, options):
    """Gradients of all inputs, also through the stored buckets."""
    check_gradients(memory, aggregation, options)


@pytest.mark.slow
@ALL
def test_chunked_gradients_match_recurrent_for_all_pairs(memory, aggregation, options):
    check_gradients(memory, aggregation, options)


def stream(inputs, case, parts, cache_dtype=None):
    """Run a case's tokens call by call."""
    start, outputs, gates = 0, [], []
    cache = init_cache(
        inputs["initial"], case.config, len(case.q), case.tokens, cache_dtype=cache_dtype
    )
    for part in parts:
        here = slice(start, start + part)
        names = (*"qkvu", "coefficients")
        taken = {name: tree_map(lambda x, p=here: x[:, p], inputs[name]) for name in names}
        mask = None if case.mask is None else torch.tensor(case.mask[:, here])
        result = extend(**inputs | taken, cache=cache, config=case.config, mask=mask)
        outputs.append(result.output)
        gates.append(result.gates)
        start, cache = start + part, result.cache
    return torch.cat(outputs, dim=1), torch.cat(gates, dim=1), cache


def splits_of(tokens, seed):
    """Return single tokens, one call, and a random split into at most 5 calls."""
    cuts = sorted(np.random.default_rng(seed).permutation(tokens - 1)[:4] + 1)
    return [[1] * tokens, [tokens], np.diff([0, *cuts, tokens]).tolist()]


def check_streams(case, seed=0):
    inputs = arrays(case)
    with torch.no_grad():
        whole = call(inputs, case)
        for parts in splits_of(case.tokens, seed):
            output, gates, cache = stream(inputs, case, parts)
            assert_close(output, whole.output, EXACT, name=f"output {parts}")
            if case.config.rule.reads_cache:
                assert_close(gates, whole.gates, EXACT, name=f"gates {parts}")
                assert_close(cache, whole.cache, EXACT, name=f"cache {parts}")


@FEWER
def test_split_stream_matches_full_pass(memory, aggregation, options):
    """Outputs, gates, and the whole cache: no slot has a bucket that was merged."""
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])


@pytest.mark.slow
@ALL
def test_split_stream_matches_full_pass_for_all_pairs(memory, aggregation, options):
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("linear-normalized", "ssc", "restart"),
        ("swla", "residual", "restart"),
        ("dla", "soup", "checkpoint"),
        ("titans", "grm", "checkpoint"),
    ],
)
def test_stream_gradients_match_full_pass(memory, aggregation, mode):
    """Gradients of all inputs, through all caches."""
    options = {"tokens": 14, "segment_size": 3, "mask": "some", "state_init_mode": mode}
    case = make_fenwick_case(memory, aggregation, **options)
    results = []
    for split in (None, (3, 1, 7, 3)):
        inputs = arrays(case)
        result = call(inputs, case) if split is None else stream(inputs, case, split)
        output, cache = (result.output, result.cache) if split is None else result[::2]
        tensors = leaves(inputs)
        actual = torch.autograd.grad(projected((output, cache)), tensors, materialize_grads=True)
        results.append([x.numpy() for x in actual])
    assert_close(results[1], results[0], GRADIENT, name="gradient")


@pytest.mark.parametrize("mode", ["checkpoint", "restart"])
def test_detached_caches_stop_gradients(mode):
    """Detached gradients match between the methods and differ from full ones."""
    case = make_fenwick_case("linear", "grm", tokens=14, segment_size=3, state_init_mode=mode)
    detached = case.with_config(detach_cached_states=True, detach_cached_context=True)
    grads = []
    for one, method in ((case, "chunked"), (detached, "chunked"), (detached, "recurrent")):
        inputs = arrays(one)
        loss = call(inputs, one, method).output.sin().sum()
        grads.append([x.numpy() for x in torch.autograd.grad(loss, [inputs[n] for n in "qkv"])])
    assert_close(grads[1], grads[2], GRADIENT)
    assert np.abs(grads[0][1] - grads[1][1]).max() > 1e-4
    inputs = arrays(detached)
    loss = stream(inputs, detached, (5, 4, 5))[0].sin().sum()
    streamed = [x.numpy() for x in torch.autograd.grad(loss, [inputs[n] for n in "qkv"])]
    if mode == "restart":  # in `checkpoint` mode the state itself connects segments
        assert_close(streamed, grads[1], GRADIENT)


def test_ties_go_to_the_larger_bucket():
    """Equation 16: with u = 0 every score is the same."""
    case = make_fenwick_case("linear", "ssc", tokens=23, segment_size=3, ssc_top_k=2)
    case = case._replace(u=np.zeros_like(case.u))
    check(case)
    assert (run(case).gates[:, -1] > 0).sum(1).tolist() == [[0, 2, 2, 0, 2]] * 2


def test_zero_retention_matches_recurrent():
    """Retention at and near 0 inside a bucket: values and gradients."""
    case = make_fenwick_case("linear", "residual", segment_size=3, state_init_mode="restart")
    case = case.with_zero_decay()
    check(case)
    assert_close(*(gradients(case, method) for method in METHODS), GRADIENT, name="gradient")


def test_grown_cache_continues_stream():
    case = make_fenwick_case("swla", "grm", tokens=29, segment_size=3, state_init_mode="restart")
    inputs, start = arrays(case), 11
    names = (*"qkvu", "coefficients")
    parts = [
        inputs | {name: tree_map(lambda x, p=part: x[:, p], inputs[name]) for name in names}
        for part in (slice(0, start), slice(start, None))
    ]
    with torch.no_grad():
        whole = call(inputs, case)
        first = memory_caching(**parts[0], config=case.config)
        assert first.cache.stored.length.shape == (2, 3)
        cache = grow(first.cache, case.config, case.tokens)
        assert cache.stored.length.shape == (2, 4)
        second = extend(**parts[1], cache=cache, config=case.config)
    output = torch.cat([first.output, second.output], dim=1)
    assert_close(output, whole.output, EXACT, name="output")
    assert_close(second.cache, whole.cache, EXACT, name="cache")


@pytest.mark.parametrize("mode", ["checkpoint", "restart"])
def test_bfloat16_cache_does_not_depend_on_split(mode):
    """Merged states are rounded in the same places, whether inside a call or between calls."""
    case = make_fenwick_case("linear", "grm", tokens=26, segment_size=3, state_init_mode=mode)
    inputs = arrays(case)
    with torch.no_grad():
        results = [
            stream(inputs, case, parts, cache_dtype=torch.bfloat16)
            for parts in ((26,), (1,) * 26, (7, 9, 10))
        ]
        exact = stream(inputs, case, (26,))
    assert {w.dtype for w in results[0][-1].stored.weights} == {torch.bfloat16}
    for result in results[1:]:
        assert_close(result[0], results[0][0], EXACT)
    assert_close(results[0][0], exact[0], 2e-2)


def test_work_grows_with_the_logarithm_of_the_length():
    """No tensor has the size of tokens times segments; gates have one column per exponent."""
    case = make_fenwick_case("linear", "grm", tokens=512, batch=1, heads=1, segment_size=2)
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    with Sizes():
        result = run(case)
    assert result.gates.shape[-1] == 1 + (256).bit_length()
    assert max(largest) < 512 * 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "aggregation", "mode", "size"),
    [
        ("linear", "grm", "restart", 1),
        ("swla", "ssc", "restart", 3),
        ("titans", "soup", "checkpoint", 3),
    ],
)
def test_extend_compiles_once(memory, aggregation, mode, size):
    """One Dynamo graph serves every position of a stream."""
    options = {"segmentation": "fenwick", "segment_size": 2, "chunk_size": 2}
    config = MCConfig(8, 2, MEMORIES[memory], aggregation, state_init_mode=mode, **options)
    layer, x = make_layer(config), draw(2, 12, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer.extend, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, final = layer.forward_with_cache(x)
        first, cache = compiled(x[:, :size], layer.init_cache(2, 12))
        outputs = [first]
        with torch.compiler.set_stance("fail_on_recompile"):
            for start in range(size, 12, size):
                y, cache = compiled(x[:, start : start + size], cache)
                outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected, EXACT)
    assert_close(cache, final, EXACT)


def test_stored_buckets_are_copied_only_when_a_segment_completes():
    case = make_fenwick_case("linear", "grm", tokens=9, segment_size=4, state_init_mode="restart")
    layer, x = make_layer(case.config), draw(1, 9, 8)
    cache, copied = layer.init_cache(1, 9), []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            pointer = cache.stored.weights[0].data_ptr()
            cache = layer.extend(token, cache)[1]
            copied.append(cache.stored.weights[0].data_ptr() != pointer)
    assert copied == [False, False, False, True] * 2 + [False]
