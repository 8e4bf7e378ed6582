"""Log-likelihoods in padded batches with shared contexts equal those of single full passes."""

import jax.numpy as jnp
import numpy as np
import pytest

import train.harness.scoring as scoring
from helpers.generation_cases import make_model
from helpers.likelihoods import continue_greedily, likelihood
from mc_core.errors import NotFiniteError
from train.harness.scoring import batch_rows, score, truncate_middle

CONTEXTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8], [12, 0, 3], [3, 1, 4, 1])
NEW = ([5], [3, 5, 8], [9, 7, 9, 3, 2, 3, 8])


@pytest.fixture(scope="module")
def model():
    return make_model("linear-grm", jnp.float32)


def test_scores_equal_full_passes_and_contexts_are_read_once(model, monkeypatch):
    requests = [(context, new) for new in NEW for context in CONTEXTS]
    requests.append((CONTEXTS[0], continue_greedily(model, CONTEXTS[0], 3)))
    read, finished = [], []

    def counting(model, contexts, capacity):
        read.extend(map(tuple, contexts))
        return prefill(model, contexts, capacity)

    prefill = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", counting)
    found = score(model, requests, batch_size=3, advance=finished.append)
    for (context, new), one in zip(requests, found, strict=True):
        total, greedy = likelihood(model, context, new)
        assert one.log_probability == pytest.approx(total, abs=1e-4)
        assert one.greedy == greedy
    assert found[-1].greedy
    assert not all(one.greedy for one in found)
    assert sorted(row for row in read if row != (0,)) == sorted(map(tuple, CONTEXTS))
    assert len(read) % 3 == 0  # batches are filled up
    assert sum(finished) == len(requests)


@pytest.mark.slow
def test_long_continuations_are_scored_in_blocks(model, monkeypatch):
    blocks = scoring.make_blocks
    monkeypatch.setattr(scoring, "make_blocks", lambda rows: blocks(rows, 4))
    requests = [(CONTEXTS[0], NEW[2]), (CONTEXTS[1], NEW[1])]
    for request, one in zip(requests, score(model, requests, 3), strict=True):
        assert one.log_probability == pytest.approx(likelihood(model, *request)[0], abs=1e-4)


def test_empty_continuations_are_certain(model):
    (one,) = score(model, [([3, 1, 4, 1], [])], 3)
    assert one == (0.0, True)


def test_nonfinite_logits_are_reported():
    model = make_model("linear-grm", jnp.float32)
    model.norm.scale.set_value(jnp.full_like(model.norm.scale[...], jnp.nan))
    with pytest.raises(NotFiniteError, match="the logits of a request are not finite"):
        score(model, [([3, 1, 4, 1], [4])], 3)


def test_contexts_are_truncated_in_the_middle():
    assert truncate_middle(list(range(10)), 6) == [0, 1, 2, 7, 8, 9]
    assert truncate_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert truncate_middle(list(range(10)), 1) == [9]
    for limit in (10, 11, None):
        assert truncate_middle(list(range(10)), limit) == list(range(10))


def test_automatic_batches_hold_about_the_same_number_of_tokens():
    assert [batch_rows(capacity, None) for capacity in (16, 256, 1024, 65_536)] == [64, 64, 16, 1]
    assert batch_rows(1024, 5) == 5
    assert np.prod([2048, batch_rows(2048, None)]) == scoring.BATCH_TOKENS
