"""A custom memory in one file: the delta rule with decay, for both frameworks.

    W_t = α_t W_{t-1} - η_t (W k_t - v_t) k_tᵀ        y = W_t q

The gradient of `||W k - v||² / 2` is taken at the memory W before the token's chunk; with
`chunk_size=1` that is W_{t-1}. The memory then supports both methods, all aggregations, streaming,
inspection, training and parity.

    mc --import examples/custom_memory.py train configs/demo.yaml \
        model.layer.memory.kind=decayed_delta model.layer.chunk_size=8
    mc --import examples/custom_memory.py parity check --full --kind decayed_delta
"""

from dataclasses import dataclass
from importlib.util import find_spec

from mc_core import MemoryConfig, register_memory


@register_memory
@dataclass(frozen=True)
class DecayedDeltaConfig(MemoryConfig):
    """`step` is η and `retention` α, as in the other memories."""

    kind = "decayed_delta"
    description = "matrix, gradient steps on the L2 loss: the delta rule with decay"
    ranges = {"step": (0.0, 1.0), "retention": (0.0, 1.0)}  # noqa: RUF012 - read only
    gradient_uses_weights = True
    normalizes_qk = True
    has_l2_loss = True  # for the recall that `inspect` reports

    coefficients: str = "token"
    step: float = 0.1
    retention: float = 0.99
    learn_initial: bool = False


if find_spec("jax"):
    import jax.numpy as jnp

    import mc_jax.numerics

    @mc_jax.register_backend(DecayedDeltaConfig.kind)
    class JaxDecayedDelta(mc_jax.MatrixMemory):
        """Arrays are [..., heads, tokens, width]; each token has a gradient `error activationᵀ`."""

        def loss(self, apply, k, v):
            """Return `||W k - v||² / 2`, which `inspect` reports."""
            return jnp.sum((apply(0, k) - v) ** 2, axis=-1) / 2

        def rank_one_updates(self, weights, k, v):
            """Return the activations k and the errors `W k - v`."""
            read = mc_jax.numerics.einsum_f32("...oi,...ci->...co", weights[0], k, dtype=k.dtype)
            return mc_jax.RankOneUpdates((k,), (read - v,))


if find_spec("torch"):
    import torch

    import mc_torch.numerics

    @mc_torch.register_backend(DecayedDeltaConfig.kind)
    class TorchDecayedDelta(mc_torch.MatrixMemory):
        """The same memory in PyTorch."""

        def loss(self, apply, k, v):
            """Return `||W k - v||² / 2`, which `inspect` reports."""
            return torch.sum((apply(0, k) - v) ** 2, dim=-1) / 2

        def rank_one_updates(self, weights, k, v):
            """Return the activations k and the errors `W k - v`."""
            # k may be bfloat16; the memory is float32.
            read = mc_torch.numerics.einsum_f32("...oi,...ci->...co", weights[0], k, dtype=k.dtype)
            return mc_torch.RankOneUpdates((k,), (read - v,))
