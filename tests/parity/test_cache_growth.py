"""`grow` adds empty slots and preserves the existing ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mc_jax.cache import add_slots as add_slots_jax
from mc_torch.cache import add_slots as add_slots_torch


@pytest.mark.parametrize("slots", [2, 3, 7])
@pytest.mark.parametrize(
    ("add_slots", "to_array"),
    [(add_slots_jax, jnp.asarray), (add_slots_torch, torch.from_numpy)],
    ids=["jax", "torch"],
)
def test_grow_keeps_slots_and_pads_with_zeros(add_slots, to_array, slots):
    stored = {"weights": np.random.default_rng(0).random((2, 3, 4, 5)), "length": np.ones((2, 3))}
    grown = add_slots(tuple(map(to_array, stored.values())), slots)
    for before, after in zip(stored.values(), map(np.asarray, grown), strict=True):
        assert after.shape[1] == max(slots, 3)
        np.testing.assert_allclose(after[:, :3], before, rtol=1e-6)
        assert not after[:, 3:].any()
