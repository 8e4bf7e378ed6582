"""Deep linear attention: an MLP memory trained by gradient steps (equation 30).

W_t = α_t W_{t-1} - η_t ∇ℓ(W; k_t, v_t), with the gradient at the chunk's initial memory W.
"""

from mc_core.memory_kinds import DLAConfig
from mc_torch.backends.base import register_backend
from mc_torch.backends.mlp import MLPMemory


@register_backend(DLAConfig.kind)
class DLA(MLPMemory):
    """Deep linear attention, with the default write of `base.Memory`."""
