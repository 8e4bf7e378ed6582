"""`initial_weights`: how W_0 of an MLP memory is initialized, in both packages."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from mc_core import DLAConfig, MCConfig, MLPConfig, TitansConfig

HEADS, WIDTH = 2, 16


def initial_weights(package: Any, memory: MLPConfig, dtype: str = "float32") -> list[np.ndarray]:
    """Return W_0 of a new layer, in float64."""
    config = MCConfig(HEADS * WIDTH, HEADS, memory)
    if package is mc_jax:
        layer = mc_jax.MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))
        assert {w[...].dtype for w in layer.initial} == {jnp.dtype(dtype)}
        return [np.asarray(w[...], np.float64) for w in layer.initial]
    layer = mc_torch.MemoryCachingLayer(config, dtype=getattr(torch, dtype))
    assert {w.dtype for w in layer.initial} == {getattr(torch, dtype)}
    return [w.detach().double().numpy() for w in layer.initial]


PACKAGES = pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])


@PACKAGES
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_orthogonal_layers_and_a_last_layer_of_zeros(package, dtype, tolerance):
    """Products with keys keep angles; the mean square is that of `normal`."""
    memory = TitansConfig(depth=3, expansion=4, initial_weights="orthogonal")
    first, middle, last = initial_weights(package, memory, dtype)
    assert [w.shape[1:] for w in (first, middle, last)] == [(64, 16), (64, 64), (16, 64)]
    for w, scale in ((first, 4), (middle, 1)):
        for head in w:
            np.testing.assert_allclose(head.T @ head, scale * np.eye(head.shape[1]), atol=tolerance)
        assert np.abs(w[0] - w[1]).max() > 0.1
        np.testing.assert_allclose(np.square(w).mean(), 1 / w.shape[2], rtol=tolerance)
    assert not last.any()


@PACKAGES
def test_normal_weights_by_default(package):
    first, last = initial_weights(package, DLAConfig(expansion=8))
    for w in (first, last):
        np.testing.assert_allclose(np.square(w).mean(), 1 / w.shape[2], rtol=0.1)
    gram = first[0].T @ first[0]
    assert np.abs(gram - np.diag(np.diag(gram))).max() > 0.5


def test_unknown_initial_weights_are_refused():
    with pytest.raises(
        ValueError, match="initial_weights = 'zero': must be one of 'normal', 'orth"
    ):
        TitansConfig(initial_weights="zero")
