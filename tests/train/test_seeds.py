"""The seed of a run."""

import numpy as np
import pytest

from helpers.tiny_run import TINY
from train.config import from_dict
from train.step import build


@pytest.mark.parametrize(("other", "same"), [(7, True), (8, False)])
def test_seed_determines_initial_parameters(other, same):
    states = [
        build(from_dict(TINY | {"data": {"corpus": "x"}, "run": {"steps": 9, "seed": seed}}))[1]
        for seed in (7, other)
    ]
    one, two = (np.asarray(state.params["embed"]["embedding"]) for state in states)
    assert one.any()
    assert np.array_equal(one, two) == same
