"""Slots of cached memories: writes, and reads in blocks and runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax.cached_reads
import mc_torch.cached_reads
from helpers.cases import assert_close
from helpers.torch_calls import leaves
from helpers.torch_layers import draw
from mc_torch import Segments
from mc_torch.cache import write_slots


@pytest.mark.usefixtures("float64", "strict")
def test_jax_cached_reads_match_einsum():
    """The last run is partial, and runs do not start at segment boundaries."""
    rng, (b, h, c, n) = np.random.default_rng(0), (2, 2, 600, 7)
    x, weights = rng.standard_normal((b, h, c, 3)), rng.standard_normal((b, n, h, 5, 3))
    segment = np.broadcast_to(np.arange(c, dtype=np.int32) // 90, (b, c))
    gates = rng.standard_normal((b, h, c, n)) * (np.arange(n) < segment[:, None, :, None])

    def read(x, weights):
        return jnp.einsum("bshoi,bshci->bshco", weights[0], x)

    given = map(jnp.asarray, (x, gates, weights, segment))
    y = jax.jit(lambda x, g, w, s: mc_jax.cached_reads.sum_cached_reads(read, x, g, (w,), s))(
        *given
    )
    assert_close(y, np.einsum("bhcs,bshoi,bhci->bhco", gates, weights, x), 1e-14)


def test_only_filled_slots_are_read():
    seen = []

    def read(x, weights):
        seen.append(weights[0].shape[1])
        return torch.einsum("bshoi,bxhci->bshco", weights[0], x)

    x, weights = draw(2, 2, 16, 3), draw(2, 9, 2, 5, 3)
    gates = torch.where(torch.arange(9) < 6, draw(2, 2, 16, 9), 0.0)
    expected = torch.einsum("bhcs,bshoi,bhci->bhco", gates, weights, x)
    six = torch.full((2, 16), 6)
    assert_close(
        mc_torch.cached_reads.sum_cached_reads(read, x, gates, (weights,), six), expected, 1e-14
    )
    assert seen == [4, 2]
    none = mc_torch.cached_reads.sum_cached_reads(
        read, x, torch.zeros_like(gates), (weights,), 0 * six
    )
    assert none.shape == expected.shape
    assert not none.any()


def test_torch_cached_reads_match_einsum():
    """Each run reads up to its last slot: half of all (token, slot) pairs."""
    seen = []

    def read(x, weights):
        seen.append(x.shape[3] * weights[0].shape[1])
        return torch.einsum("bshoi,bxhci->bshco", weights[0], x)

    c, n = 1100, 11
    x, weights = draw(2, 2, c, 3), draw(2, n, 2, 5, 3)
    segment = (torch.arange(c) // 100).expand(2, c)
    gates = torch.where(torch.arange(n) < segment[:, None, :, None], draw(2, 2, c, n), 0.0)
    expected = torch.einsum("bhcs,bshoi,bhci->bhco", gates, weights, x)
    assert_close(
        mc_torch.cached_reads.sum_cached_reads(read, x, gates, (weights,), segment), expected, 1e-14
    )
    assert sum(seen) < 0.65 * c * n


def test_write_slots_writes_completed_segments():
    stored = Segments((draw(2, 4, 3),), draw(2, 4), torch.zeros(2, 4))
    some = Segments((draw(2, 3, 3, seed=1),), draw(2, 3, seed=1), torch.ones(2, 3))
    slots = torch.tensor([[1, 9, 0], [4, 9, 3]])
    written = write_slots(stored, some, slots)
    for old, new, found in zip(*map(leaves, (stored, some, written)), strict=True):
        expected = old.clone()
        expected[0, 1], expected[0, 0], expected[1, 3] = new[0, 0], new[0, 2], new[1, 2]
        assert torch.equal(found, expected)
    assert write_slots(stored, some, torch.full((2, 3), 4)) is stored
