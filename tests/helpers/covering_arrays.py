"""Covering arrays: few configurations that contain every pair of choices."""

from collections.abc import Collection, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows that contain every pair of values of two different names.

    Most faults are triggered by one or two choices, so these rows find nearly as many as the full
    product. Rows are deterministic. Each starts with a missing pair and takes
    for every other name the value that covers the most missing pairs.

    Args:
        choices: the values of each name.
    """
    names = list(choices)
    if len(names) < 2:
        return [{name: value} for name in names for value in choices[name]]
    missing = dict.fromkeys(
        frozenset(pair)
        for a, b in combinations(names, 2)
        for pair in product(_places(a, choices), _places(b, choices))
    )
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in names:
            if name not in row:
                # Ties go to the value that is next in turn, so that all occur about equally often.
                values = range(len(choices[name]))
                turn = [*values[len(rows) % len(values) :], *values[: len(rows) % len(values)]]
                row[name] = max(turn, key=lambda value, name=name: _gain(name, value, row, missing))
        for pair in combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append({name: choices[name][row[name]] for name in names})
    return rows


def numbered(rows: Sequence[dict[str, Any]], group: int, slow: Collection[int] = ()) -> list[Any]:
    """Return one parameter of pytest per row: its number; every second row is a slow test.

    Args:
        rows: from `pairwise`.
        group: number of values of the second name. Alternate groups keep the odd rows, so that
            every value of the first and of the second name remains among the quick tests.
        slow: numbers of other rows that are slow tests, because the remaining ones have their
            kinds, aggregations and masks.
    """
    return [
        pytest.param(
            number,
            id="-".join(map(str, row.values())),
            marks=pytest.mark.slow if (number + number // group) % 2 or number in slow else (),
        )
        for number, row in enumerate(rows)
    ]


def thinned(step: int, **choices: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test with all combinations; about one in `step` is a quick test.

    These are the ones whose places add up to a multiple of `step`, so that every value of a name
    occurs among them.
    """
    return pytest.mark.parametrize(
        tuple(choices),
        [
            pytest.param(
                *(choices[name][i] for name, i in zip(choices, places, strict=True)),
                marks=pytest.mark.slow if sum(places) % step else (),
            )
            for places in product(*(range(len(values)) for values in choices.values()))
        ],
    )


def _places(name: str, choices: dict[str, Sequence[Any]]) -> list[tuple[str, int]]:
    return [(name, place) for place in range(len(choices[name]))]


def _gain(name: str, value: int, row: dict[str, int], missing: dict[frozenset, None]) -> int:
    return sum(frozenset([(name, value), other]) in missing for other in row.items())
