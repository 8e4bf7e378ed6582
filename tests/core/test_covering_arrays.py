"""Covering arrays, from which other tests take their configurations."""

from itertools import combinations, product

import pytest

from helpers.cases import AGGREGATIONS, GATES, KINDS, MASKS, MODES
from helpers.covering_arrays import pairwise


@pytest.mark.parametrize(
    ("choices", "most"),
    [
        ({"a": (1, 2), "b": (3, 4)}, 4),
        ({"a": (0, 1), "b": (0, 1), "c": (0, 1)}, 6),
        ({"a": range(4), "b": range(4), "c": range(4), "d": range(4)}, 27),
        ({"m": KINDS, "a": AGGREGATIONS, "k": MASKS, "s": MODES, "g": GATES, "t": (1, 2)}, 36),
        ({"a": ([1], [1]), "b": ({}, {"x": 1}, {})}, 6),  # equal values, and unhashable ones
    ],
    ids=["two", "binary", "square", "suite", "equal"],
)
def test_covering_array_contains_every_pair(choices, most):
    rows = pairwise(**choices)
    assert len(rows) <= most
    for a, b in combinations(choices, 2):
        for x, y in product(choices[a], choices[b]):
            assert any(row[a] is x and row[b] is y for row in rows), (a, x, b, y)


def test_covering_array_is_deterministic_and_names_choices():
    choices = {"a": "xyz", "b": (1, 2), "c": (True, False)}
    assert pairwise(**choices) == pairwise(**choices)
    assert all(list(row) == list(choices) for row in pairwise(**choices))


def test_covering_array_of_one_factor():
    assert pairwise(a="xy") == [{"a": "x"}, {"a": "y"}]
