"""Cases with `segmentation="fenwick"`, and comparison with the oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import oracle
from helpers.cases import (
    AGGREGATIONS,
    GATES,
    MASKS,
    MEMORIES,
    FunctionCase,
    assert_close,
    make_case,
)
from helpers.recurrence_cases import EXACT
from mc_core.cache_checks import NO_SLOT

# Memories and start modes: `restart` sums states, which requires decay-only transitions.
STARTS = [
    (memory, mode)
    for memory, config in MEMORIES.items()
    for mode in ("checkpoint", "restart")
    if mode == "checkpoint" or config.decay_only_transition
]
# Lengths that divide nothing, whole segments, and powers of two of segments.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-token": {"tokens": 1},
    "less-than-two-segments": {"tokens": 7},
    "two-segments": {"tokens": 8, "mask": "some"},
    "four-segments": {"tokens": 16, "chunk_size": 2, "mask": "padded"},
    "segments-of-one": {"tokens": 13, "segment_size": 1, "mask": "some"},
    "short-last-segment": {"tokens": 37, "segment_size": 3, "chunk_size": 2, "mask": "some"},
    "masked-segment": {"tokens": 23, "segment_size": 3, "mask": "segment", "pooling": "sum"},
    "large-chunks": {"tokens": 21, "segment_size": 2, "chunk_size": 9, "mask": "row"},
}


def make_fenwick_case(memory: str, aggregation: str, **options: Any) -> FunctionCase:
    """Draw inputs for a layer with buckets."""
    return make_case(memory, aggregation, segmentation="fenwick", **options)


def with_options(pairs: Any) -> list[Any]:
    """Distribute layouts, gates and score options over pairs of (memory, mode) and aggregation."""
    out = []
    for i, ((memory, mode), aggregation) in enumerate(pairs):
        layout = list(LAYOUTS)[2 + (i + i // 6) % (len(LAYOUTS) - 2)]
        options = LAYOUTS[layout] | {"state_init_mode": mode, "seed": i, "ssc_top_k": 1 + i % 3}
        options["gate"] = GATES[(i + i // 6) % 2]
        if i % 3 == 0:
            options |= {"gate_bias": 0.5, "pool_norm": "l2", "softmax_temperature": 0.3}
        name = f"{memory}-{mode}-{aggregation}-{layout}-{options['gate']}"
        out.append(pytest.param(memory, aggregation, options, id=name))
    return out


def assert_matches_oracle(result: Any, case: FunctionCase) -> None:
    """Compare output, gates, and the buckets and state after the last token."""
    expected = oracle.memory_caching(*case[:6], **case.oracle_options)
    segments, cache = result.cache.segments, result.cache
    weights = segments.weights
    if expected.normalizers is not None:  # kept as the last row of W
        weights, normalizers = (weights[0][..., :-1, :],), weights[0][..., -1, :]
        assert_close(normalizers, expected.normalizers, EXACT, name="normalizers")
    assert_close(result.output, expected.output, EXACT, name="output")
    assert_close(result.gates, expected.gates, EXACT, name="gates")
    assert_close(weights, expected.states, EXACT, name="states")
    assert_close(segments.pool, expected.pools, EXACT, name="pools")
    assert_close(cache.state.momentum, expected.momentum or (), EXACT, name="momentum")
    np.testing.assert_array_equal(segments.length, expected.lengths)
    np.testing.assert_array_equal(cache.position, case.tokens)
    np.testing.assert_array_equal(cache.slot, NO_SLOT)


@st.composite
def random_fenwick_cases(draw: st.DrawFn) -> FunctionCase:
    memory, mode = draw(st.sampled_from(STARTS))
    case = make_fenwick_case(
        memory,
        draw(st.sampled_from(AGGREGATIONS)),
        tokens=draw(st.integers(1, 27)),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        mask=draw(st.sampled_from(MASKS)),
        seed=draw(st.integers(0, 99)),
        segment_size=draw(st.integers(1, 5)),
        chunk_size=draw(st.integers(1, 6)),
        state_init_mode=mode,
        ssc_top_k=draw(st.integers(1, 4)),
        pooling=draw(st.sampled_from(["mean", "sum"])),
        softmax_temperature=draw(st.sampled_from([1.0, 0.3])),
        use_q_as_u=draw(st.booleans()),
        gate=draw(st.sampled_from(GATES)),
        gate_bias=draw(st.sampled_from([None, 1.0])),
        pool_norm=draw(st.sampled_from(["none", "l2"])),
    )
    return case._replace(u=None) if case.config.use_q_as_u else case
