"""`mc_jax` with `segmentation="fenwick"` (section 7): both methods match the oracle, and streams.

Compilation dominates the run time: full grids are slow tests here, and quick ones in
`test_torch_fenwick`.
"""

from itertools import product

import pytest

from helpers import torch_calls
from helpers.cases import AGGREGATIONS, assert_close
from helpers.fenwick_cases import LAYOUTS, STARTS, assert_matches_oracle, make_fenwick_case
from helpers.fenwick_cases import with_options
from helpers.jax_calls import run, run_with_gradients
from helpers.recurrence_cases import EXACT, GRADIENT, METHODS

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
