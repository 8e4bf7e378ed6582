"""Deep linear attention: an MLP memory trained by gradient steps (equation 30).

W_t = α_t W_{t-1} - η_t ∇ℓ(W; k_t, v_t), the gradient taken at the memory that the chunk began with.
"""

from mc_torch.backends.base import (
    ChunkMix,
    Coefficients,
    MemoryState,
    decay_products,
    mask_coefficients,
)
from mc_torch.backends.mlp import MLPMemory, token_gradient
from mc_torch.numerics import Array, tree_map


class DLA(MLPMemory):
    """See the module; implements `base.Memory`."""

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        gradient = token_gradient(self.events(state.anchor, k, v))
        step, retention = at.step[..., None, None], at.retention[..., None, None]
        weights = tree_map(lambda w, g: retention * w - step * g, state.weights, gradient)
        return state._replace(weights=weights)

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        at = mask_coefficients(at, written)
        decay = decay_products(at.retention)
        return ChunkMix(state=decay[..., 0], events=decay[..., 1:] * at.step[..., None, :])
