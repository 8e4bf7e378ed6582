"""`mc_jax` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

Compilation dominates the run time: full grids are slow tests here, and quick ones in
`test_torch_fenwick`.
"""

from functools import partial

import jax
import numpy as np
import pytest

from helpers import torch_calls
from helpers.cases import assert_close
from helpers.fenwick_cases import (
    assert_matches_oracle,
    make_fenwick_case,
    with_options,
)
from helpers.jax_calls import arrays, run
from helpers.recurrence_cases import EXACT, METHODS
from mc_jax import Coefficients, extend, init_cache

pytestmark = pytest.mark.usefixtures("float64", "strict")

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


@pytest.mark.parametrize(("memory", "aggregation", "options"), with_options(QUICK))
def test_split_stream_matches_full_pass(memory, aggregation, options):
    """Outputs and the whole cache: no slot has a bucket that was merged."""
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])
