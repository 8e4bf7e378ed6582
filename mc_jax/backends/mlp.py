"""MLP memory of `dla` and `titans`: read and inner gradient in closed form.

z_1 = W_1 x, a_l = gelu(z_l), z_{l+1} = W_{l+1} a_l, M(x) = z_L (+ x), or x + LN(z_L).
Losses: `dot`, `-<M(k), v>`, with output gradient -v; `l2`, `||M(k) - v||²`, with 2(M(k) - v).
"""

import jax.numpy as jnp

from mc_core.config import CLIP_EPS
from mc_jax.backends.base import (
    Apply,
    Memory,
    MemoryState,
    RankOneUpdates,
    Weights,
    apply_weights,
)
from mc_jax.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    gelu,
    gelu_slope,
    orthogonalize,
    save_for_backward,
    scale_rows,
    standardize,
    state_dtype,
)


class MLPMemory(Memory):
    """Base class of `dla` and `titans`, which differ only in the write."""

    def read(self, apply: Apply, q: Array) -> Array:
        return self._output(apply(self._last, self._hidden(apply, q)), q)

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        if self.norm is not None:
            return scale_rows(weight, self.read(apply, q))
        y = apply(self._last, scale_rows(weight, self._hidden(apply, q)))
        return y + scale_rows(weight, q) if self.config.residual else y

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = self.read(apply, k)
        target = v.astype(y.dtype)
        if self.config.objective == "l2":
            return jnp.sum((y - target) * (y - target), axis=-1)
        return -jnp.sum(y * target, axis=-1)

    def prepare(self, initial: Weights) -> Weights:
        return initial[self.config.fixed_layers :]

    def encode(self, x: Array) -> Array:
        if not self.config.fixed_layers:
            return x
        fixed, z = apply_weights(self.initial, x.dtype), x
        for layer in range(self.config.fixed_layers):
            z = gelu(save_for_backward(fixed(layer, z)))
        return (standardize(z)[0] * z.shape[-1] ** -0.5).astype(x.dtype)  # of norm 1

    def rank_one_updates(self, weights: Weights, k: Array, v: Array) -> RankOneUpdates:
        if self.config.written_layers == "last":
            error = -v.astype(state_dtype(v.dtype))
            return RankOneUpdates((k,), (error,))
        dtype, last = k.dtype, self.config.depth - 1
        activations, outputs = [k], []
        for layer, weight in enumerate(weights):
            z = einsum_f32("...oi,...ci->...co", weight, activations[-1], dtype=dtype)
            outputs.append(save_for_backward(z))
            if layer < last:
                activations.append(gelu(outputs[-1]))
        errors = [self._output_gradient(outputs[-1], k, v)]
        for layer in range(last, 0, -1):
            gradient = einsum_f32("...oi,...co->...ci", weights[layer], errors[0], dtype=dtype)
            errors.insert(0, save_for_backward(gradient) * gelu_slope(outputs[layer - 1]))
        if self.config.inner_clip is not None:
            clip = self.config.inner_clip
            errors = [_clip_errors(d, a, clip) for d, a in zip(errors, activations, strict=True)]
        return RankOneUpdates(tuple(activations), tuple(errors))

    def end_chunk(self, state: MemoryState) -> MemoryState:
        """Orthogonalize the update of each layer by the chunk.

        `W <- R + O(W - R)`, with what retention has left of the chunk's first memory, R, and
        `orthogonalize`, O.
        """
        retained = self.retain(state.anchor, state.retention)
        pairs = zip(retained, state.weights, strict=True)
        return state._replace(weights=tuple(r + orthogonalize(w - r) for r, w in pairs))

    @property
    def _last(self) -> int:
        """Index of the last layer among those of the state."""
        return self.config.depth - 1 - self.config.fixed_layers

    def _hidden(self, apply: Apply, q: Array) -> Array:
        """Return the input of the last layer."""
        if self.config.written_layers == "last":
            return q
        for layer in range(self.config.depth - 1):
            q = gelu(apply(layer, q))
        return q

    def _output(self, z: Array, x: Array) -> Array:
        if self.norm is not None:
            gain, bias = (_expand_heads(p, z) for p in self.norm)
            return x.astype(z.dtype) + standardize(z)[0] * gain + bias
        return z + x.astype(z.dtype) if self.config.residual else z

    def _output_gradient(self, z: Array, k: Array, v: Array) -> Array:
        """Return the inner loss's gradient at the last layer's output z [..., h, c, v]."""
        target = v.astype(z.dtype)
        gradient = -target
        if self.config.objective == "l2":
            gradient = 2 * (self._output(z, k) - target)
        if self.norm is None:
            return gradient
        unit, inverse = standardize(z)
        scaled = gradient * _expand_heads(self.norm[0], z)
        mean = jnp.mean(scaled, axis=-1, keepdims=True)
        projection = jnp.mean(scaled * unit, axis=-1, keepdims=True)
        return inverse * (scaled - mean - unit * projection)


def _expand_heads(parameter: Array, like: Array) -> Array:
    """Reshape [h, v] to broadcast with [..., h, c, v]."""
    return expand_leading_dims(parameter.astype(like.dtype)[:, None, :], like.ndim)


def _clip_errors(delta: Array, a: Array, clip: float) -> Array:
    """Scale δ so that the Frobenius norm of `δ aᵀ` is at most `clip`."""
    a = a.astype(delta.dtype)
    squares = jnp.sum(delta * delta, -1) * jnp.sum(a * a, -1)
    return scale_rows(clip / jnp.maximum(clip, jnp.sqrt(squares + CLIP_EPS)), delta)
