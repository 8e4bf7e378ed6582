"""The denominator of a normalized linear read (equation 2)."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax.backends
import mc_torch.backends
from mc_core.config import NORMALIZER_FLOOR, LinearConfig

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("backends", "to_array"),
    [(mc_jax.backends, jnp.asarray), (mc_torch.backends, torch.from_numpy)],
    ids=["jax", "torch"],
)
def test_normalizer_floor_is_a_maximum(backends, to_array):
    memory = backends.make_memory(LinearConfig(normalize=True))
    sums = np.array([3.0, 1e-3, NORMALIZER_FLOOR, 1e-9, 0.0, -2.0])
    values = np.arange(1.0, 13.0).reshape(6, 2)
    products = to_array(np.concatenate([values, sums[:, None]], axis=1))
    read = np.asarray(memory.read(lambda layer, x: products, products))
    expected = values / np.array([3.0, 1e-3, *[NORMALIZER_FLOOR] * 4])[:, None]
    np.testing.assert_allclose(read, expected, rtol=1e-12)
