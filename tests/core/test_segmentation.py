"""Plans: token positions, chunks within segments, and restarts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_core import MCConfig, Plan, make_plan, segment_lengths


def make(tokens: int, **options: object) -> Plan:
    return make_plan(tokens, MCConfig(8, 2, **options))


def test_constant_segment_lengths():
    assert segment_lengths(12, "constant", 4) == (4, 4, 4)
    assert segment_lengths(13, "constant", 4) == (4, 4, 4, 1)
    assert segment_lengths(3, "constant", 4) == (3,)
    assert segment_lengths(1, "constant", 1) == (1,)


@given(st.integers(1, 10_000))
@settings(derandomize=True, deadline=None)
def test_logarithmic_segment_lengths_are_binary_digits(tokens):
    lengths = segment_lengths(tokens, "logarithmic")
    assert sum(lengths) == tokens
    assert list(lengths) == sorted(set(lengths), reverse=True)
    assert all(length.bit_count() == 1 for length in lengths)


def test_logarithmic_segment_lengths_match_hand_computation():
    assert segment_lengths(37, "logarithmic") == (32, 4, 1)
    assert segment_lengths(64, "logarithmic") == (64,)
    assert segment_lengths(7, "logarithmic", 2) == (4, 2, 1)  # independent of the segment size


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=9))
    config = MCConfig(
        8,
        2,
        chunk_size=draw(st.integers(1, 15)),
        state_init_mode=draw(st.sampled_from(["checkpoint", "restart"])),
        segment_size=draw(st.integers(1, 14)),
        segmentation=draw(st.sampled_from(["constant", "logarithmic"])),
    )
    return make_plan(sum(lengths), config, draw(st.sampled_from([None, lengths])))


pytestmark = pytest.mark.filterwarnings("ignore:segmentation = .logarithmic.")
every_plan = given(plans())
many = settings(derandomize=True, deadline=None, max_examples=200)


@every_plan
@many
def test_chunk_positions_are_a_bijection(plan):
    real = plan.chunk_tokens[plan.chunk_tokens < plan.tokens]
    np.testing.assert_array_equal(real, np.arange(plan.tokens))  # once each, in order
    np.testing.assert_array_equal(plan.chunk_tokens[plan.chunk_positions], np.arange(plan.tokens))
    assert (plan.chunk_tokens <= plan.tokens).all()
    assert plan.chunk_tokens.size == plan.restarts.size * plan.chunk_size
    assert len(plan.restarts) == plan.rows


@every_plan
@many
def test_chunks_do_not_cross_segments(plan):
    for chunk in plan.chunk_tokens.reshape(-1, plan.chunk_size):
        tokens = chunk[chunk < plan.tokens]
        np.testing.assert_array_equal(chunk[: len(tokens)], tokens)  # padding comes last
        if len(tokens):
            assert len(set(plan.segment_of[tokens])) == 1
            assert plan.offset_of[tokens[0]] % plan.chunk_size == 0
            assert plan.starts_chunk[tokens].tolist() == [True] + [False] * (len(tokens) - 1)


@every_plan
@many
def test_plan_segment_properties(plan):
    starts = np.cumsum([0, *plan.lengths[:-1]])
    assert plan.segments == len(plan.lengths)
    for segment, (start, length) in enumerate(zip(starts, plan.lengths, strict=True)):
        tokens = np.arange(start, start + length)
        assert (plan.segment_of[tokens] == segment).all()
        np.testing.assert_array_equal(plan.offset_of[tokens], np.arange(length))
        np.testing.assert_array_equal(plan.starts_segment[tokens], tokens == start)
        row = plan.segment_tokens[segment]
        np.testing.assert_array_equal(row, [*tokens] + [plan.tokens] * (len(row) - length))
        last = plan.chunk_tokens.reshape(-1, plan.chunk_size)[plan.last_chunk[segment]]
        assert tokens[-1] in last
        assert plan.ends[segment] == tokens[-1] + 1


@every_plan
@many
def test_plan_restarts(plan):
    """Section 3.4: in restart mode all segments restart, in parallel if padding is small."""
    first = plan.chunk_tokens.reshape(-1, plan.chunk_size)[:, 0]
    restarts = plan.restarts.reshape(-1)
    opening = np.isin(first, np.flatnonzero(plan.starts_segment))
    if restarts.sum() == 1:
        assert restarts[0]
        assert plan.rows == 1
    else:
        np.testing.assert_array_equal(restarts, opening)
    if plan.rows > 1:
        assert plan.rows == plan.segments
        assert restarts.size <= 2 * sum(-(-x // plan.chunk_size) for x in plan.lengths)


def test_plan_rows_and_chunk_sizes():
    checkpoint, restart = (
        make(13, segment_size=4),
        make(13, segment_size=4, state_init_mode="restart"),
    )
    assert (checkpoint.rows, restart.rows) == (1, 4)
    assert checkpoint.restarts.sum() == 1
    assert restart.restarts.sum() == 4
    assert checkpoint.chunk_size == 4  # no larger than the longest segment
    assert make(13, segment_size=4, chunk_size=3).chunk_size == 3
    # Parallel rows of one long and many short segments would be mostly padding.
    config = MCConfig(8, 2, chunk_size=1, state_init_mode="restart")
    uneven = make_plan(20, config, [15, 1, 1, 1, 1, 1])
    assert uneven.rows == 1
    assert uneven.restarts.sum() == 6


@pytest.mark.parametrize("mode", ["checkpoint", "restart"])
def test_plan_uses_configured_segmentation(mode):
    options = {"state_init_mode": mode, "chunk_size": 4}
    assert make(37, segmentation="logarithmic", **options).lengths == (32, 4, 1)
    assert make(37, segment_size=16, **options).lengths == (16, 16, 5)
    assert make(5, segment_size=16, **options).lengths == (5,)
    assert make_plan(9, MCConfig(8, 2, **options), (2, 3, 4)).lengths == (2, 3, 4)
