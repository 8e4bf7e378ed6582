"""Multi-query associative recall: distribution of examples and batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import RunConfig
from train.config.recall_schema import MQARConfig
from train.tasks.examples import SPLITS, make_batches
from train.tasks.mqar import gap_distribution, make_draw, make_draws

lengths = st.integers(1, 12).flatmap(lambda n: st.tuples(st.integers(4 * n, 6 * n + 9), st.just(n)))


@given(lengths, st.integers(26, 90), st.booleans(), st.integers(0, 2**32), st.sampled_from(SPLITS))
def test_every_query_has_its_pair_in_context(length, vocab_size, random, index, split):
    config = MQARConfig(vocab_size, (length,), random_non_queries=random)
    tokens, pairs = length
    example = make_draw(config, length, seed=3)(split, index)
    sequence, half = example.tokens, vocab_size // 2
    assert sequence.shape == (tokens,)
    keys, values = sequence[: 2 * pairs : 2], sequence[1 : 2 * pairs : 2]
    assert len(set(keys)) == len(set(values)) == pairs
    assert keys.min() >= 1
    assert keys.max() < half <= values.min()
    assert values.max() < vocab_size
    value_of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    asked = sequence[example.places].tolist()
    assert sorted(asked) == sorted(value_of)
    assert [value_of[key] for key in asked] == example.labels.tolist()
    assert sequence[example.origins].tolist() == asked
    assert len(set(example.places)) == pairs
    assert (example.places >= 2 * pairs).all()
    assert not (example.places % 2).any()
    rest = np.delete(sequence[2 * pairs :], example.places - 2 * pairs)
    assert ((rest >= 0) & (rest < vocab_size)).all()
    assert random or not rest.any()


def test_other_positions_hold_random_tokens():
    config = MQARConfig(64, ((256, 2),))
    rest = make_draw(config, (256, 2), 0)("train", 0).tokens[4:]
    assert len(set(rest)) > 50
    assert rest.max() >= 32


def test_gaps_follow_the_power_law():
    """Chi-square test of the gap of the first pair, over 16 gaps and 4,000 examples."""
    length, count = (64, 16), 4000
    draw = make_draw(MQARConfig(512, (length,)), length, seed=0)
    first = [(draw("train", i).places[0] - 32) // 2 for i in range(count)]
    seen, law = np.bincount(first, minlength=16), gap_distribution(0.01, length)
    np.testing.assert_allclose(law, np.arange(1, 17) ** -0.99 / (np.arange(1, 17) ** -0.99).sum())
    # 15 degrees of freedom: above 44.3 with probability 1e-4; a flat law gives over 2,000.
    assert ((seen - count * law) ** 2 / (count * law)).sum() < 44.3


def test_later_gaps_follow_the_law_without_replacement():
    """Without replacement: the second of 2 is y with sum over x != y of p(x) p(y) / (1 - p(x))."""
    length, count = (16, 2), 4000
    draw = make_draw(MQARConfig(64, (length,)), length, seed=1)
    second = [(draw("train", i).places[1] - 4) // 2 for i in range(count)]
    p = gap_distribution(0.01, length)
    pairs = p[:, None] * p / (1 - p[:, None])
    expected = count * (pairs.sum(0) - pairs.diagonal())
    seen = np.bincount(second, minlength=len(p))
    assert ((seen - expected) ** 2 / expected).sum() < 25  # 5 degrees of freedom, 1.4e-4


CONFIG = MQARConfig(64, ((16, 2), (24, 4)), examples=24)
DRAWS = [make_draw(CONFIG, length, seed=5) for length in CONFIG.lengths]


def batches(batch_size: int, accumulation: int = 1, seed: int = 5):
    run = RunConfig(steps=1, batch_size=batch_size, accumulation=accumulation, seed=seed)
    return make_batches(DRAWS, CONFIG.examples, run)


def test_examples_do_not_depend_on_batch_or_order():
    wanted = {draw("train", i).tokens.tobytes() for draw in DRAWS for i in range(24)}
    assert len(wanted) == 48
    for batch_size, accumulation, seed in ((3, 1, 5), (4, 2, 6), (12, 2, 7)):
        made = batches(batch_size, accumulation, seed)
        steps = 2 * 24 // (batch_size * accumulation)
        rows = [row.tobytes() for _ in range(steps) for row in np.concatenate(next(made).tokens)]
        assert len(rows) == 48
        assert set(rows) == wanted


def test_batches_are_full():
    """Also if an epoch ends within a batch."""
    made = batches(5)
    drawn = [next(made).tokens for _ in range(2 * 24)]
    assert {tokens.shape for tokens in drawn} == {(1, 5, 16), (1, 5, 24)}
    rows = np.concatenate([tokens[0] for tokens in drawn[::2]])
    assert {(rows == row).all(1).sum() for row in rows} == {5}


def test_lengths_alternate():
    made = batches(3, accumulation=2)
    shapes = [(one.tokens.shape, one.places.shape) for one in (next(made) for _ in range(4))]
    assert shapes == [((2, 3, 16), (2, 3, 2)), ((2, 3, 24), (2, 3, 4))] * 2


def test_equal_lengths_share_a_shape():
    """Padding has weight 0; the queries are unchanged."""
    lengths = ((24, 2), (24, 4), (16, 2))
    wide = make_draws(CONFIG, lengths, 5)
    for length, draw, slots in zip(lengths, wide, (4, 4, 2), strict=True):
        plain, example = make_draw(CONFIG, length, 5)("train", 3), draw("train", 3)
        assert {len(x) for x in example[1:]} == {slots}
        assert example.weights.tolist() == [1.0] * length[1] + [0.0] * (slots - length[1])
        for one, other in zip(plain, example, strict=True):
            assert one.tolist() == other[: len(one)].tolist()


def test_splits_and_seeds_share_no_example():
    length = CONFIG.lengths[1]
    drawn = [
        make_draw(CONFIG, length, seed)(split, i).tokens.tobytes()
        for seed in (0, 1)
        for split in SPLITS
        for i in range(50)
    ]
    assert len(set(drawn)) == len(drawn)


def test_epochs_have_different_orders():
    made = batches(24)
    epochs = [next(made).tokens.tobytes() for _ in range(4)]
    assert len({epochs[0], epochs[2]}) == len({epochs[1], epochs[3]}) == 2


@pytest.mark.parametrize("taken", [0, 1, 5, 16, 23])
def test_data_position_resumes(taken):
    made = batches(3)
    for _ in range(taken):
        next(made)
    state = made.get_state()
    expected = [next(made) for _ in range(4)]
    fresh = batches(3)
    fresh.set_state(state)
    for one in expected:
        for left, right in zip(one, next(fresh), strict=True):
            assert np.array_equal(left, right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ((15, 4),)}, r"lengths = \[15, 4\]: must be \[tokens, pairs\] with"),
        ({"lengths": ((16, 0),)}, r"lengths = \[16, 0\]: must be \[tokens, pairs\] with"),
        ({"lengths": ()}, r"lengths = \[\]: must be at least one"),
        ({"vocab_size": 8, "lengths": ((16, 4),)}, r"must be < 4 pairs: keys are half of the 8"),
        ({"power": 0.0}, "power = 0.0: must be > 0.0"),
        ({"examples": 0}, "examples = 0: must be >= 1"),
    ],
)
def test_impossible_tasks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MQARConfig(**options)
