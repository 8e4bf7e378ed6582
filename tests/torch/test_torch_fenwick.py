"""`mc_torch` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

PyTorch needs no compilation, so random searches and full grids are here; `test_fenwick` has fewer
cases of `mc_jax`.
"""

from itertools import product

import numpy as np
import pytest
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
from helpers.torch_calls import gradients, run

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
