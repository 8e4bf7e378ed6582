"""Recall slices: kinds, distances and counts against a definition by search, and intervals."""

import numpy as np
import pytest

from mc_core.errors import UserError
from train.evaluation import recall_slices as subject
from train.evaluation.bootstrap import Resampling
from train.evaluation.recall_slices import (
    HIT,
    MISS,
    OTHER,
    Recurrence,
    count_hits,
    count_ngrams,
    find_recurrences,
    make_slices,
    max_ngram,
    pack_ngrams,
)


def search(tokens: list[int], n: int, window: int) -> list[tuple[int, int]]:
    """Kind and distance of each predicted token, by search in the list of the window's tokens."""
    found = []
    for start in range(0, len(tokens) - 1, window):
        own = tokens[start : start + window + 1]
        for i in range(1, len(own)):
            kind, distance = OTHER, 0
            if i >= n - 1:
                gram = own[i - n + 1 : i + 1]
                for j in range(n - 1, i):
                    earlier = own[j - n + 1 : j + 1]
                    if earlier == gram:
                        kind, distance = HIT, i - j
                    elif earlier[:-1] == gram[:-1]:
                        kind = max(kind, MISS)
            found.append((kind, distance))
    return found


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("letters", [2, 3, 7])
def test_kinds_and_distances_match_search(n, letters):
    """The windows are shorter than the n-gram, as long, longer, and as long as the text."""
    rng = np.random.default_rng(letters)
    seen = set()
    for size in (2, 3, n, 40, 97):
        tokens = rng.integers(0, letters, size)
        for window in (1, n - 1, n, 8, 31, size - 1):
            kind, distance = find_recurrences(tokens, n, window, letters)
            expected = search(tokens.tolist(), n, window)
            assert list(zip(kind.tolist(), distance.tolist(), strict=True)) == expected
            seen.update(kind.tolist())
    assert seen == {OTHER, MISS, HIT}


def test_ngram_across_a_window_does_not_count():
    """The last token of a window is the first one of the next window, where it is only read."""
    tokens = np.array([1, 2, 0, 1, 2, 1, 2])
    kind, distance = find_recurrences(tokens, 2, 3, 3)
    # Windows 1 2 0 1 and 1 2 1 2: the pair 1 2 of the first window is not an occurrence.
    assert kind.tolist() == [OTHER, OTHER, OTHER, OTHER, OTHER, HIT]
    assert distance.tolist() == [0, 0, 0, 0, 0, 2]


def test_occurrences_overlap():
    kind, distance = find_recurrences(np.zeros(6, int), 3, 5, 2)
    assert kind.tolist() == [OTHER, OTHER, HIT, HIT, HIT]
    assert distance.tolist() == [0, 0, 1, 1, 1]


def test_distance_is_that_of_the_last_occurrence():
    tokens = np.array([5, 6, 0, 5, 6, 1, 2, 5, 6, 5, 7])
    kind, distance = find_recurrences(tokens, 2, 10, 8)
    assert (kind[7], distance[7]) == (HIT, 4)
    assert (kind[9], distance[9]) == (MISS, 0)


@pytest.mark.parametrize("n", [2, 4])
def test_counts_match_search(n, monkeypatch):
    """Blocks of the training text overlap, so every n-gram is counted once."""
    rng = np.random.default_rng(0)
    tokens, text = rng.integers(0, 3, 30), rng.integers(0, 3, 100).tolist()
    found = find_recurrences(tokens, n, 29, 3)
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    expected = [
        grams.count(tokens[i - n + 1 : i + 1].tolist()) if kind == HIT else -1
        for i, kind in enumerate(found.kind, 1)
    ]
    for block in (1, 7, 100, 2**20):
        monkeypatch.setattr(subject, "BLOCK", block)
        assert count_hits(tokens, found, np.array(text, np.uint16), n, 3).tolist() == expected
    assert count_ngrams(np.array(text), np.zeros(0, np.uint64), n, 3).tolist() == []
    assert count_ngrams(np.zeros(n - 1, int), np.zeros(2, np.uint64), n, 3).tolist() == [0, 0]


def test_packed_ngrams_are_distinct_up_to_64_bits():
    assert [max_ngram(size) for size in (256, 4096, 50257, 2)] == [8, 5, 4, 64]
    tokens = np.array([255] * 8 + [254], np.uint8)
    assert pack_ngrams(tokens, 8, 256).tolist() == [2**64 - 1, 2**64 - 2]
    with pytest.raises(UserError, match=r"--ngram = 9: must be <= 8 for a vocabulary of 256"):
        pack_ngrams(tokens, 9, 256)


def test_slices_partition_the_tokens():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 4000).astype(np.int8)
    hit = kind == HIT
    distance = np.where(hit, rng.integers(1, 2000, 4000), 0)
    counts = np.where(hit, 10 ** rng.integers(0, 6, 4000) - 1, -1)
    slices = make_slices(Recurrence(kind, distance), counts)
    for group, whole in (
        ("all", ~hit | hit),
        ("kind", ~hit | hit),
        ("distance", hit),
        ("count", hit),
        ("rare", hit & (counts < 100)),
    ):
        own = [one for one in slices if one.group == group]
        assert (sum(one.members.astype(int) for one in own) == whole).all()
    names = [one.name for one in slices]
    assert names[4:9] == [
        f"distance {x}" for x in ("1-15", "16-63", "64-255", "256-1023", ">= 1024")
    ]
    assert names[14:16] == ["count 0", "count 1-9"]
    (near,) = (one for one in slices if (one.group, one.low) == ("distance", 16))
    assert set(distance[near.members]) <= set(range(16, 64))
    (rare,) = (one for one in slices if (one.group, one.low) == ("count", 1))
    assert set(counts[rare.members]) == {9}


def test_bootstrap_draws_whole_windows():
    """Windows without variance have no width; the interval covers the mean of normal windows."""
    counts = np.array([3, 0, 5, 2])
    assert Resampling(4, 0).mean(2.0 * counts, counts) == pytest.approx((2.0, 2.0, 2.0))
    rng = np.random.default_rng(0)
    sums = rng.normal(10, 2, 400)
    mean, low, high = Resampling(400, 0).mean(sums, np.full(400, 5))
    assert mean == pytest.approx(sums.mean() / 5)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 5 / 20, rel=0.15)
    assert low < mean < high


def test_interval_needs_two_windows():
    one = np.array([0, 4, 0])
    assert Resampling(3, 0).mean(8.0 * (one > 0), one) == (2.0, None, None)
    assert Resampling(3, 0).mean(np.zeros(3), np.zeros(3, int)) == (None, None, None)
