"""The MLP memory of `dla` and `titans`: its read and its inner gradient, in closed form.

z_1 = W_1 x, a_l = gelu(z_l), z_{l+1} = W_{l+1} a_l, M(x) = z_L (+ x), or x + LN(z_L).
Losses: dot `-<M(k), v>`, with gradient -v at the output; l2 `||M(k) - v||²`, with 2(M(k) - v).
"""

import jax.numpy as jnp

from mc_core.config import CLIP_EPS, DLAConfig, TitansConfig
from mc_jax.backends.base import Apply, Events, Weights
from mc_jax.numerics import Array, align, gelu, gelu_slope, product, standardize

Norm = tuple[Array, Array] | None  # (gain, bias), each [h, v]


def read(config: DLAConfig | TitansConfig, norm: Norm, apply: Apply, q: Array) -> Array:
    """Read queries [..., h, c, k] through the linear maps `apply`; returns [..., h, c, v]."""
    a = q
    for layer in range(config.depth - 1):
        a = gelu(apply(layer, a))
    return _output(config, norm, apply(config.depth - 1, a), q)


def events(
    config: DLAConfig | TitansConfig, norm: Norm, weights: Weights, k: Array, v: Array
) -> Events:
    """Return every token's (clipped) inner gradient at `weights`, layer by layer.

    Args:
        config: the memory's configuration.
        norm: gain and bias where `config.norm` is `layer`.
        weights: each [..., h, o, i].
        k: keys [..., h, c, k].
        v: values [..., h, c, v].
    """
    dtype = k.dtype
    inputs, outputs = [k], []
    for layer, weight in enumerate(weights):
        outputs.append(product("...oi,...ci->...co", weight, inputs[-1], dtype=dtype))
        if layer < config.depth - 1:
            inputs.append(gelu(outputs[-1]))
    target = v.astype(outputs[-1].dtype)
    if config.objective == "dot":
        delta = -target
    else:
        delta = 2 * (_output(config, norm, outputs[-1], k) - target)
    delta = _through_norm(norm, outputs[-1], delta)

    deltas = [delta]
    for layer in range(config.depth - 1, 0, -1):
        back = product("...oi,...co->...ci", weights[layer], deltas[0], dtype=dtype)
        deltas.insert(0, back * gelu_slope(outputs[layer - 1]))
    if config.inner_clip is not None:
        clip = config.inner_clip
        deltas = [_clipped(d, a, clip) for d, a in zip(deltas, inputs, strict=True)]
    return Events(tuple(inputs), tuple(deltas))


def _output(config: DLAConfig | TitansConfig, norm: Norm, z: Array, x: Array) -> Array:
    if norm is not None:
        gain, bias = (align(p.astype(z.dtype)[:, None, :], z.ndim) for p in norm)
        return x.astype(z.dtype) + standardize(z)[0] * gain + bias
    return z + x.astype(z.dtype) if config.residual else z


def _through_norm(norm: Norm, z: Array, gradient: Array) -> Array:
    if norm is None:
        return gradient
    unit, inverse = standardize(z)
    scaled = gradient * align(norm[0].astype(z.dtype)[:, None, :], z.ndim)
    mean = jnp.mean(scaled, axis=-1, keepdims=True)
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    return inverse * (scaled - mean - unit * along)


def _clipped(delta: Array, a: Array, clip: float) -> Array:
    """Scale δ so that the Frobenius norm of `δ aᵀ` is at most `clip`."""
    a = a.astype(delta.dtype)
    squares = jnp.sum(delta * delta, -1, keepdims=True) * jnp.sum(a * a, -1, keepdims=True)
    return delta * (clip / jnp.maximum(clip, jnp.sqrt(squares + CLIP_EPS)))
