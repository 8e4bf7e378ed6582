"""Sliding-window linear attention with a window of two, as a matrix memory (equations 26 and 28).

W_t = α_t W_{t-1} + β_t v_{t-1} k_{t-1}ᵀ + λ_t v_t k_tᵀ        y = W_t q
"""

import jax
import jax.numpy as jnp

from mc_core.memory_kinds import SWLAConfig
from mc_jax.backends.base import (
    ChunkDecay,
    Coefficients,
    MatrixMemory,
    MemoryState,
    decay_products,
    mask_coefficients,
    register_backend,
)
from mc_jax.numerics import Array, einsum_f32, expand_leading_dims


@register_backend(SWLAConfig.kind)
class SWLA(MatrixMemory):
    """SWLA memory; implements `base.Memory`."""

    def update(
        self, state: MemoryState, k: Array, v: Array, coefficients: Coefficients
    ) -> MemoryState:
        assert coefficients.previous is not None
        (weight,) = state.weights
        k, v = k[..., 0, :].astype(weight.dtype), v[..., 0, :].astype(weight.dtype)
        old_k, old_v = state.previous
        old = coefficients.previous[..., None, None] * (old_v[..., :, None] * old_k[..., None, :])
        new = coefficients.step[..., None, None] * (v[..., :, None] * k[..., None, :])
        weight = coefficients.retention[..., None, None] * weight + old + new
        return state._replace(weights=(weight,), previous=(k, v))

    def chunk_decay(self, coefficients: Coefficients, write_mask: Array) -> ChunkDecay:
        coefficients = mask_coefficients(coefficients, write_mask)
        assert coefficients.previous is not None
        c = write_mask.shape[-1]
        decay = decay_products(coefficients.retention)
        # Update 0 is the last unmasked token before the chunk, update i its i-th token.
        number = expand_leading_dims(jnp.arange(1, c + 1), write_mask.ndim)
        latest = jax.lax.cummax(jnp.where(write_mask > 0, number, 0), axis=write_mask.ndim - 1)
        before = jnp.concatenate([jnp.zeros_like(latest[..., :1]), latest[..., :-1]], axis=-1)
        update = expand_leading_dims(jnp.arange(c + 1), write_mask.ndim + 1)
        newest = (number[..., None] == update).astype(decay.dtype)
        previous = (before[..., None] == update).astype(decay.dtype)
        band = coefficients.step[..., None] * newest + coefficients.previous[..., None] * previous
        updates = einsum_f32("...tj,...ji->...ti", decay[..., 1:], band, exact=True)
        return ChunkDecay(state=decay[..., 0], updates=updates)
