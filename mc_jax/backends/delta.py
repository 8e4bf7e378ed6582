"""Gated delta rule as a matrix memory (arXiv:2412.06464).

W_t = α_t W_{t-1} - β_t (α_t W_{t-1} k_t - v_t) k_tᵀ        y = W_t q
"""

import jax.numpy as jnp

from mc_core.memory_kinds import DeltaConfig
from mc_jax.backends.base import Apply, MatrixMemory, register_backend
from mc_jax.numerics import Array


@register_backend(DeltaConfig.kind)
class DeltaMemory(MatrixMemory):
    """Delta rule memory: a gradient step on `||α_t W k - v||² / 2`, with the default write."""

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = apply(0, k)
        return jnp.sum((y - v.astype(y.dtype)) ** 2, axis=-1)
