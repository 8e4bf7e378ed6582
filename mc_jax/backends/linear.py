"""Linear attention as a matrix memory (equations 2 and 12).

    W_t = α_t W_{t-1} + η_t v_t φ(k_t)ᵀ        y = W_t φ(q)
    s_t = α_t s_{t-1} + η_t φ(k_t)             y = W_t φ(q) / max(s_t·φ(q), ε) if normalized

The normalizer s is stored as one more output row of W, with the constant value 1.
"""

import jax
import jax.numpy as jnp

from mc_core.config import NORMALIZER_FLOOR
from mc_core.memory_kinds import LinearConfig
from mc_jax.backends.base import Apply, MatrixMemory, RankOneUpdates, Weights, register_backend
from mc_jax.numerics import Array, scale_rows, state_dtype


@register_backend(LinearConfig.kind)
class LinearMemory(MatrixMemory):
    """Linear attention memory, with the default write of `base.Memory`."""

    def prepare(self, initial: Weights) -> Weights:
        if not self.config.normalize:
            return initial
        (weight,) = initial
        return (jnp.concatenate([weight, jnp.zeros_like(weight[..., :1, :])], axis=-2),)

    def read(self, apply: Apply, q: Array) -> Array:
        y = apply(0, self._feature(q))
        if not self.config.normalize:
            return y
        return y[..., :-1] / jnp.maximum(y[..., -1:], NORMALIZER_FLOOR)

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        if self.config.normalize:
            return scale_rows(weight, self.read(apply, q))
        return apply(0, scale_rows(weight, self._feature(q)))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = apply(0, self._feature(k))[..., : v.shape[-1]]
        return -jnp.sum(y * v.astype(y.dtype), axis=-1)

    def rank_one_updates(self, weights: Weights, k: Array, v: Array) -> RankOneUpdates:
        del weights
        return RankOneUpdates((self._feature(k),), (-self._value(v),))

    def _feature(self, x: Array) -> Array:
        if self.config.feature_map == "identity":
            return x
        # In bfloat16, elu(x) + 1 would lose most digits near elu(x) = -1.
        return (jax.nn.elu(x.astype(state_dtype(x.dtype))) + 1).astype(x.dtype)

    def _value(self, v: Array) -> Array:
        if not self.config.normalize:
            return v
        return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
