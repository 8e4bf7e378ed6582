"""Sliding-window linear attention with a window of two, as a matrix memory (equations 26 and 28).

W_t = α_t W_{t-1} + β_t v_{t-1} k_{t-1}ᵀ + λ_t v_t k_tᵀ        y = W_t q
"""

from dataclasses import dataclass

import torch

from mc_core.config import SWLAConfig
from mc_torch.backends.base import (
    Apply,
    ChunkMix,
    Coefficients,
    Events,
    MemoryState,
    Weights,
    decay_products,
    mask_coefficients,
)
from mc_torch.numerics import Array, align, product, scale_rows


@dataclass(frozen=True)
class SWLA:
    """See the module; implements `base.Memory`."""

    config: SWLAConfig
    is_mlp = False
    reaches_back = True
    mixes_linearly = True

    def prepare(self, initial: Weights) -> Weights:
        return initial

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        assert at.previous is not None
        (weight,) = state.weights
        k, v = k[..., 0, :].to(weight.dtype), v[..., 0, :].to(weight.dtype)
        old_k, old_v = state.previous
        old = at.previous[..., None, None] * (old_v[..., :, None] * old_k[..., None, :])
        new = at.step[..., None, None] * (v[..., :, None] * k[..., None, :])
        weight = at.retention[..., None, None] * weight + old + new
        return state._replace(weights=(weight,), previous=(k, v))

    def read(self, apply: Apply, q: Array) -> Array:
        return apply(0, q)

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        return apply(0, scale_rows(weight, q))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = apply(0, k)
        return -torch.sum(y * v.to(y.dtype), dim=-1)

    def events(self, weights: Weights, k: Array, v: Array) -> Events:
        del weights
        return Events((k,), (-v,))

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
