"""Deep linear attention: an MLP memory trained by gradient steps (equation 30).

W_t = α_t W_{t-1} - η_t ∇ℓ(W; k_t, v_t), the gradient taken at the memory that the chunk began with.
"""

from dataclasses import dataclass

import jax

from mc_core.config import DLAConfig
from mc_jax.backends import mlp
from mc_jax.backends.base import (
    Apply,
    ChunkMix,
    Coefficients,
    Events,
    MemoryState,
    Weights,
    decay_products,
    mask_coefficients,
)
from mc_jax.numerics import Array


@dataclass(frozen=True)
class DLA:
    """See the module; implements `base.Memory`."""

    config: DLAConfig
    norm: mlp.Norm = None
    is_mlp = True
    reaches_back = False
    mixes_linearly = False

    def prepare(self, initial: Weights) -> Weights:
        return initial

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        gradient = token_gradient(self.events(state.anchor, k, v))
        step, retention = at.step[..., None, None], at.retention[..., None, None]
        write = lambda weight, g: retention * weight - step * g  # noqa: E731
        return state._replace(weights=jax.tree.map(write, state.weights, gradient))

    def read(self, apply: Apply, q: Array) -> Array:
        return mlp.read(self.config, self.norm, apply, q)

    def events(self, weights: Weights, k: Array, v: Array) -> Events:
        return mlp.events(self.config, self.norm, weights, k, v)

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        at = mask_coefficients(at, written)
        decay = decay_products(at.retention)
        return ChunkMix(state=decay[..., 0], events=decay[..., 1:] * at.step[..., None, :])


def token_gradient(events: Events) -> Weights:
    """Build the gradients [..., h, o, i] of one token's events [..., h, 1, o]."""
    return tuple(
        delta[..., 0, :, None] * a[..., 0, None, :].astype(delta.dtype)
        for a, delta in zip(events.inputs, events.deltas, strict=True)
    )
