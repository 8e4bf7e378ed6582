"""`mc_jax` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

Compilation dominates the run time: full grids are slow tests here, and quick ones in
`test_torch_fenwick`.
"""

from functools import partial
from itertools import product

import jax
import numpy as np
import pytest
import torch

from helpers import torch_calls
from helpers.cases import AGGREGATIONS, assert_close
from helpers.fenwick_cases import (
    STARTS,
    assert_matches_oracle,
    make_fenwick_case,
    with_options,
)
from helpers.jax_calls import arrays, run, run_with_gradients
from helpers.recurrence_cases import EXACT, GRADIENT, METHODS
from mc_jax import Coefficients, extend, init_cache

pytestmark = pytest.mark.usefixtures("float64", "strict")

ALL = pytest.mark.parametrize(
    ("memory", "aggregation", "options"), with_options(product(STARTS, AGGREGATIONS))
)
LONG = {"tokens": 23, "segment_size": 3, "chunk_size": 2, "mask": "some"}
QUICK = [
    (("linear-normalized", "restart"), "grm"),
    (("swla", "restart"), "ssc"),
    (("titans", "checkpoint"), "soup"),
]


def check(case):
    results = [run(case, method) for method in METHODS]
    for result in results:
        assert_matches_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@pytest.mark.parametrize(("memory", "aggregation", "options"), with_options(QUICK))
def test_both_methods_match_oracle(memory, aggregation, options):
    check(make_fenwick_case(memory, aggregation, **options))


@pytest.mark.slow
@ALL
def test_both_methods_match_oracle_for_all_pairs(memory, aggregation, options):
    check(make_fenwick_case(memory, aggregation, **options))
    jax.clear_caches()  # programs use memory maps, and a process is limited to 65,530


def check_gradients(memory, aggregation, options, method):
    """Compare outputs with the oracle, and gradients with those of the other method in PyTorch."""
    case = make_fenwick_case(memory, aggregation, **options)
    result, actual = run_with_gradients(case, method)
    assert_matches_oracle(result, case)
    other = next(name for name in METHODS if name != method)
    assert_close(actual, torch_calls.gradients(case, other), GRADIENT, name="gradient")


@pytest.mark.parametrize(
    ("memory", "aggregation", "options", "method"),
    [
        ("swla", "grm", LONG | {"state_init_mode": "restart"}, "chunked"),
        pytest.param("titans", "residual", LONG, "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "soup", LONG, "chunked", marks=pytest.mark.slow),
        pytest.param(
            "linear", "ssc", LONG | {"gate": "token"}, "recurrent", marks=pytest.mark.slow
        ),
    ],
)
def test_gradients_match_pytorch(memory, aggregation, options, method):
    check_gradients(memory, aggregation, options, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@ALL
def test_gradients_match_pytorch_for_all_pairs(memory, aggregation, options, method):
    check_gradients(memory, aggregation, options, method)
    jax.clear_caches()


@partial(jax.jit, static_argnames="config")
def extend_compiled(tokens, weights, cache, count, config):
    """Extend a stream by the first `count` tokens."""
    *inputs, coefficients, mask = tokens
    initial, norm, gate_bias = weights
    options = {"config": config, "mask": mask, "count": count, "norm": norm}
    return extend(*inputs, initial, coefficients, cache, gate_bias=gate_bias, **options)


def stream(case, splits, width):
    """Stream a case in parts of the same shape, which share one program.

    Padding contains NaN, and True in the mask.
    """
    inputs, rows = arrays(case), len(case.q)
    coefficients = Coefficients(*case.coefficients)
    tokens = (*(getattr(case, name) for name in "qkvu"), coefficients, case.mask)

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


def check_streams(case, seed):
    """Compare streams with a full pass in PyTorch, which needs no compilation."""
    expected = torch_calls.run(case)
    cuts = np.sort(np.random.default_rng(seed).permutation(case.tokens - 1)[:3] + 1)
    for splits in ([case.tokens], np.diff([0, *cuts, case.tokens]).tolist(), [1] * case.tokens):
        output, cache = stream(case, splits, case.tokens)
        assert_close(output, expected.output, EXACT, name=f"output {splits}")
        assert_close(cache, expected.cache, EXACT, name=f"cache {splits}")


@pytest.mark.parametrize(
    ("memory", "aggregation", "options"),
    [
        pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if i == 1 else ())
        for i, case in enumerate(with_options(QUICK))
    ],
)
def test_split_stream_matches_full_pass(memory, aggregation, options):
    """Outputs and the whole cache: no slot has a bucket that was merged."""
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])


@pytest.mark.slow
@ALL
def test_split_stream_matches_full_pass_for_all_pairs(memory, aggregation, options):
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [("swla", "ssc", "restart"), ("titans", "grm", "checkpoint"), ("dla", "soup", "checkpoint")],
)
def test_gradients_through_cache_match_full_pass(memory, aggregation, mode):
    """Gradients of the outputs of two calls match those of a full pass in PyTorch."""
    case = make_fenwick_case(memory, aggregation, **LONG, state_init_mode=mode)
    weight = np.random.default_rng(1).standard_normal(case.v.shape)
    names = (*"qkvu", "coefficients")

    def stream_loss(inputs):
        cache, total = init_cache(inputs["initial"], case.config, 2, case.tokens), 0.0
        for part in (slice(0, 5), slice(5, None)):
            taken = {n: jax.tree.map(lambda x, p=part: x[:, p], inputs[n]) for n in names}
            mask = jax.numpy.asarray(case.mask[:, part])
            result = extend(**inputs | taken, cache=cache, config=case.config, mask=mask)
            cache, total = result.cache, total + (result.output * weight[:, part]).sum()
        return total

    inputs = torch_calls.arrays(case)
    loss = (torch_calls.call(inputs, case).output * torch.tensor(weight)).sum()
    wanted = [inputs[name] for name in "qkvu"]
    expected = torch.autograd.grad(loss, wanted, materialize_grads=True)
    actual = jax.jit(jax.grad(stream_loss))(arrays(case))
    for name, gradient in zip("qkvu", expected, strict=True):
        assert_close(actual[name], gradient.numpy(), GRADIENT, name=name)
