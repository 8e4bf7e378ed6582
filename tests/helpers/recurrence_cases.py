"""Cases for the recurrences of both frameworks, and comparison with the oracle."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import oracle
from helpers.cases import (
    AGGREGATIONS,
    GATES,
    MASKS,
    MEMORIES,
    MODES,
    FunctionCase,
    assert_close,
    make_case,
)

METHODS = ("chunked", "recurrent")
EXACT, GRADIENT = 1e-10, 1e-9


def assert_matches_oracle(result: Any, case: FunctionCase) -> None:
    """Compare output, gates, cached states and pools, counts, and the state of the stream."""
    expected = oracle.memory_caching(*case[:6], **case.oracle_options)
    segments, state = result.cache.segments, result.cache.state
    weights = segments.weights
    if expected.normalizers is not None:  # kept as the last row of W
        weights, normalizers = (weights[0][..., :-1, :],), weights[0][..., -1, :]
        assert_close(normalizers, expected.normalizers, EXACT, name="normalizers")
    assert_close(result.output, expected.output, EXACT, name="output")
    assert_close(result.gates, expected.gates, EXACT, name="gates")
    assert_close(weights, expected.states, EXACT, name="states")
    assert_close(segments.pool, expected.pools, EXACT, name="pools")
    assert_close(state.momentum, expected.momentum or (), EXACT, name="momentum")
    assert_close(state.weights, [w[:, -1] for w in segments.weights], EXACT, name="online")
    ends = np.cumsum(oracle.lengths_of(case.tokens, case.config, case.lengths))
    mask = np.ones(case.q.shape[:2], bool) if case.mask is None else case.mask
    counts = np.add.reduceat(mask, [0, *ends[:-1]], axis=1)
    np.testing.assert_array_equal(segments.length, counts)
    np.testing.assert_array_equal(result.cache.length, counts[:, -1])
    np.testing.assert_array_equal(result.cache.position, case.tokens)


@st.composite
def random_cases(draw: st.DrawFn) -> FunctionCase:
    tokens = draw(st.integers(1, 21))
    lengths = None
    if draw(st.integers(0, 3)) == 0:
        cuts = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=4)) - {tokens}
        lengths = tuple(int(x) for x in np.diff([0, *sorted(cuts), tokens]))
    aggregation = draw(st.sampled_from(AGGREGATIONS))
    case = make_case(
        draw(st.sampled_from(sorted(MEMORIES))),
        aggregation,
        tokens=tokens,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        mask=draw(st.sampled_from(MASKS)),
        lengths=lengths,
        seed=draw(st.integers(0, 99)),
        segmentation=draw(st.sampled_from(["constant", "constant", "logarithmic"])),
        segment_size=draw(st.integers(1, 8)),
        chunk_size=draw(st.integers(1, 9)),
        state_init_mode=draw(st.sampled_from(MODES)),
        ssc_top_k=draw(st.integers(1, 4)),
        pooling=draw(st.sampled_from(["mean", "sum"])),
        softmax_temperature=draw(st.sampled_from([1.0, 0.3])),
        use_q_as_u=draw(st.booleans()),
        gate=draw(st.sampled_from(GATES)),
        gate_bias=draw(st.sampled_from([None, 1.0])),
        pool_norm=draw(st.sampled_from(["none", "l2"])),
    )
    return case._replace(u=None) if case.config.use_q_as_u else case


# Without shrinking, which would compile every smaller example.
examples = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow],
)


EDGES = {
    "one-token": {"tokens": 1},
    "one-short-segment": {"tokens": 5, "segment_size": 9, "chunk_size": 20},
    "segments-of-one": {"tokens": 7, "segment_size": 1},
    "uneven": {"tokens": 14, "lengths": (7, 1, 4, 1, 1), "chunk_size": 2, "mask": "some"},
    "masked-segment": {"tokens": 9, "mask": "segment", "segment_size": 3, "chunk_size": 2},
}
# Ages up to 9 segments, so that there are more levels than the 4 components of u.
TOKEN_GATES = {"gate": "token", "tokens": 19, "segment_size": 2, "mask": "some"}


def with_layouts(pairs: Any) -> list[Any]:
    """Distribute start modes, masks and segment layouts over pairs of memory and aggregation."""
    layouts = ({}, {"chunk_size": 1}, {"chunk_size": 2, "segment_size": 5}, {"segment_size": 7})
    out = []
    for i, (memory, aggregation) in enumerate(pairs):
        options = {**layouts[i % 4], "state_init_mode": MODES[(i + i // 6) % 2]}
        mask = MASKS[i % 5]
        name = "-".join(map(str, (memory, aggregation, mask, *options.values())))
        options |= {"tokens": 13 - i % 3, "ssc_top_k": 1 + i % 2, "mask": mask, "seed": i}
        if (i + i // 6) % 3 == 0:
            options |= {"gate_bias": 0.5, "pool_norm": "l2"}
        out.append(pytest.param(memory, aggregation, options, id=name))
    return out


def all_pairs() -> list[Any]:
    """Return every memory with every aggregation."""
    return with_layouts(product(MEMORIES, AGGREGATIONS))
