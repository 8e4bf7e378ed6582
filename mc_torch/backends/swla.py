"""Sliding-window linear attention with a window of two, as a matrix memory (equations 26 and 28).

W_t = α_t W_{t-1} + β_t v_{t-1} k_{t-1}ᵀ + λ_t v_t k_tᵀ        y = W_t q
"""

import torch

from mc_core.memories import SWLAConfig
from mc_torch.backends.base import (
    ChunkMix,
    Coefficients,
    MatrixMemory,
    MemoryState,
    decay_products,
    mask_coefficients,
    register_backend,
)
from mc_torch.numerics import Array, align, product


@register_backend(SWLAConfig.kind)
class SWLA(MatrixMemory):
    """See the module; implements `base.Memory`."""

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        assert at.previous is not None
        (weight,) = state.weights
        k, v = k[..., 0, :].to(weight.dtype), v[..., 0, :].to(weight.dtype)
        old_k, old_v = state.previous
        old = at.previous[..., None, None] * (old_v[..., :, None] * old_k[..., None, :])
        new = at.step[..., None, None] * (v[..., :, None] * k[..., None, :])
        weight = at.retention[..., None, None] * weight + old + new
        return state._replace(weights=(weight,), previous=(k, v))

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        at = mask_coefficients(at, written)
        assert at.previous is not None
        c = written.shape[-1]
        decay = decay_products(at.retention)
        # Event 0 is the real token before the chunk, event i its i-th token.
        number = align(torch.arange(1, c + 1, device=written.device), written.ndim)
        latest = torch.cummax(torch.where(written > 0, number, 0), dim=-1).values
        before = torch.cat([torch.zeros_like(latest[..., :1]), latest[..., :-1]], dim=-1)
        event = align(torch.arange(c + 1, device=written.device), written.ndim + 1)
        newest = (number[..., None] == event).to(decay.dtype)
        previous = (before[..., None] == event).to(decay.dtype)
        band = at.step[..., None] * newest + at.previous[..., None] * previous
        events = product("...tj,...ji->...ti", decay[..., 1:], band, exact=True)
        return ChunkMix(state=decay[..., 0], events=events)
