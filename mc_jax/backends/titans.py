"""Titans: an MLP memory trained by gradient steps with momentum (equations 34 and 35).

S_t = β_t S_{t-1} - η_t ∇ℓ(W; k_t, v_t), the gradient taken at the memory that the chunk began with
W_t = α_t W_{t-1} + S_t
"""

import jax

from mc_core.memories import TitansConfig
from mc_jax.backends.base import (
    ChunkMix,
    Coefficients,
    MemoryState,
    decay_products,
    mask_coefficients,
    outer_products,
    register_backend,
)
from mc_jax.backends.mlp import MLPMemory
from mc_jax.numerics import Array, product


@register_backend(TitansConfig.kind)
class Titans(MLPMemory):
    """See the module; implements `base.Memory`."""

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        assert at.momentum is not None
        gradient = outer_products(self.events(state.anchor, k, v), state.weights[0].dtype)
        step, momentum = at.step[..., None, None], at.momentum[..., None, None]
        retention = at.retention[..., None, None]
        surprise = jax.tree.map(lambda s, g: momentum * s - step * g, state.momentum, gradient)
        weights = jax.tree.map(lambda w, s: retention * w + s, state.weights, surprise)
        return state._replace(weights=weights, momentum=surprise)

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        at = mask_coefficients(at, written)
        assert at.momentum is not None
        decay = decay_products(at.retention)
        speed = decay_products(at.momentum)
        # A masked token carries the momentum on but does not add it to the weights.
        added = decay[..., 1:] * written[..., None, :]
        both = product("...tj,...ji->...ti", added, speed, exact=True)
        return ChunkMix(
            state=decay[..., 0],
            events=both[..., 1:] * at.step[..., None, :],
            momentum=both[..., 0],
            momentum_keep=speed[..., -1, 0],
            momentum_add=speed[..., -1, 1:] * at.step,
        )
