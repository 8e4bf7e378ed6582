"""`mc_torch` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

PyTorch needs no compilation, so random searches and full grids are here; `test_fenwick` has fewer
cases of `mc_jax`.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from helpers.cases import AGGREGATIONS, assert_close
from helpers.fenwick_cases import (
    LAYOUTS,
    STARTS,
    assert_matches_oracle,
    make_fenwick_case,
    random_fenwick_cases,
    with_options,
)
from helpers.recurrence_cases import EXACT, GRADIENT, METHODS, examples
from helpers.torch_calls import arrays, call, gradients, run
from mc_torch import extend, init_cache
from mc_torch.numerics import tree_map

ALL = with_options(product(STARTS, AGGREGATIONS))


def check(case):
    results = [run(case, method) for method in METHODS]
    for result in results:
        assert_matches_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@pytest.mark.parametrize(("memory", "aggregation", "options"), ALL)
def test_both_methods_match_oracle(memory, aggregation, options):
    check(make_fenwick_case(memory, aggregation, **options))


@given(case=random_fenwick_cases())
@settings(examples, max_examples=100)
def test_both_methods_match_oracle_on_random_cases(case):
    check(case)


@pytest.mark.parametrize(
    ("memory", "mode"), [("swla", "restart"), ("titans", "checkpoint"), ("delta", "checkpoint")]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_oracle(layout, memory, mode):
    check(make_fenwick_case(memory, "grm", state_init_mode=mode, **LAYOUTS[layout]))


@pytest.mark.parametrize(("memory", "aggregation", "options"), ALL)
def test_chunked_gradients_match_recurrent(memory, aggregation, options):
    """Gradients of all inputs, also through the stored buckets."""
    case = make_fenwick_case(memory, aggregation, **options)
    results = [gradients(case, method) for method in METHODS]
    assert_close(*results, GRADIENT, name="gradient")
    for name in ("q", "k", "v", *(["gate_bias"] if case.gate_bias is not None else [])):
        assert np.abs(results[0][name]).max() > 1e-3, f"no gradient reaches {name}"


def stream(inputs, case, parts):
    """Run a case's tokens call by call."""
    start, outputs, gates = 0, [], []
    cache = init_cache(inputs["initial"], case.config, len(case.q), case.tokens)
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
    """Return single tokens, one call, and two random splits."""
    rng = np.random.default_rng(seed)
    cuts = [sorted(rng.permutation(tokens - 1)[: min(n, tokens - 1)] + 1) for n in (2, 5)]
    random = [np.diff([0, *cut, tokens]).tolist() for cut in cuts]
    return [[1] * tokens, [tokens], *random]


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


@pytest.mark.parametrize(("memory", "aggregation", "options"), ALL)
def test_split_stream_matches_full_pass(memory, aggregation, options):
    """Outputs, gates, and the whole cache: no slot has a bucket that was merged."""
    check_streams(make_fenwick_case(memory, aggregation, **options), options["seed"])
