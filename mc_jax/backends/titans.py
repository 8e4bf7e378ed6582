"""Titans: an MLP memory trained by gradient steps with momentum (equations 34 and 35).

S_t = β_t S_{t-1} - η_t ∇ℓ(W; k_t, v_t), with the gradient at the chunk's initial memory W
W_t = α_t W_{t-1} + S_t
"""

import jax

from mc_core.memory_kinds import TitansConfig
from mc_jax.backends.base import (
    ChunkDecay,
    Coefficients,
    MemoryState,
    decay_products,
    mask_coefficients,
    register_backend,
)
from mc_jax.backends.mlp import MLPMemory
from mc_jax.numerics import Array, einsum_f32


@register_backend(TitansConfig.kind)
class Titans(MLPMemory):
    """Titans memory; implements `base.Memory`."""

    def update(
        self, state: MemoryState, k: Array, v: Array, coefficients: Coefficients
    ) -> MemoryState:
        assert coefficients.momentum is not None
        gradient = self.gradient(state, k, v, coefficients)
        momentum = coefficients.momentum[..., None, None]
        step = self.step(coefficients)[..., None, None]
        surprise = jax.tree.map(lambda s, g: momentum * s - step * g, state.momentum, gradient)
        retained = self.retain(state.weights, coefficients.retention)
        weights = jax.tree.map(lambda w, s: w + s, retained, surprise)
        return state._replace(weights=weights, momentum=surprise)

    def chunk_decay(self, coefficients: Coefficients, write_mask: Array) -> ChunkDecay:
        coefficients = mask_coefficients(coefficients, write_mask)
        assert coefficients.momentum is not None
        step = self.step(coefficients)
        decay = decay_products(coefficients.retention)
        momentum_decay = decay_products(coefficients.momentum)
        # A masked token keeps the momentum but does not add it to the weights.
        masked_decay = decay[..., 1:] * write_mask[..., None, :]
        updates = einsum_f32("...tj,...ji->...ti", masked_decay, momentum_decay, exact=True)
        return ChunkDecay(
            state=decay[..., 0],
            updates=updates[..., 1:] * step[..., None, :],
            momentum=updates[..., 0],
            momentum_retention=momentum_decay[..., -1, 0],
            momentum_updates=momentum_decay[..., -1, 1:] * step,
        )

    def step(self, coefficients: Coefficients) -> Array:
        """Return η [..., h, c], or η (1 - β) if only the last layer is written."""
        if not self.config.delta_rule:
            return coefficients.step
        assert coefficients.momentum is not None
        return coefficients.step * (1 - coefficients.momentum)
