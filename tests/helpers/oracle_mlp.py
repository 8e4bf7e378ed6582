"""MLP memories of the oracle, for one head and one token; letters as in `oracle`."""

import math
from collections.abc import Sequence

import numpy as np

from mc_core import MemoryConfig
from mc_core.config import CLIP_EPS, NORM_EPS, UPDATE_EPS
from mc_core.memory_kinds import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS

Array = np.ndarray
Norm = tuple[Array, Array] | None  # gain and bias of the layer norm, each [v]


def gelu(z: Array) -> Array:
    """Return the exact GELU, `z Φ(z)`."""
    return z * _normal_cdf(z)


def gelu_slope(z: Array) -> Array:
    """Return GELU's derivative, `Φ(z) + z Φ'(z)`."""
    return _normal_cdf(z) + z * np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi)


def _normal_cdf(z: Array) -> Array:
    return np.array([0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in z])


def layer_norm(z: Array, gain: Array, bias: Array) -> Array:
    """Return `(z - mean) / sqrt(var + eps) * gain + bias` of z [v]."""
    return (z - z.mean()) / math.sqrt(z.var() + NORM_EPS) * gain + bias


def layer_norm_backward(gradient: Array, z: Array, gain: Array) -> Array:
    """Return the gradient at z [v] from the one at the layer norm's output [v]."""
    spread = math.sqrt(z.var() + NORM_EPS)
    unit = (z - z.mean()) / spread
    at_unit = gradient * gain
    # The mean and the spread move with z, which takes out the two directions they follow.
    return (at_unit - at_unit.mean() - unit * (at_unit * unit).mean()) / spread


def mlp(
    weights: Sequence[Array], x: Array, memory: MemoryConfig, norm: Norm = None
) -> tuple[Array, list[Array], list[Array]]:
    """Run the MLP memory on x [k].

    Returns M(x) [v], the activations `a_0 = x, a_1, ...` that enter each layer, and each `z_l`.
    If only the last layer is written, what enters it is standardized and scaled to norm 1.
    """
    entering, outgoing = [x], []
    for layer, weight in enumerate(weights):
        if layer > 0 and layer == len(weights) - 1 and memory.written_layers == "last":
            a = entering[-1]
            entering[-1] = (a - a.mean()) / math.sqrt((a.var() + NORM_EPS) * len(a))
        outgoing.append(weight @ entering[-1])
        entering.append(gelu(outgoing[-1]))
    z = outgoing[-1]
    if memory.norm == "layer":
        return x + layer_norm(z, *norm), entering[:-1], outgoing
    return (x + z if memory.residual else z), entering[:-1], outgoing


def inner_loss(
    weights: Sequence[Array], k: Array, v: Array, memory: MemoryConfig, norm: Norm = None
) -> float:
    """Return `-<M(k), v>` (dot) or `||M(k) - v||²` (l2) for key k [k] and value v [v]."""
    y = mlp(weights, k, memory, norm)[0]
    return float(-(y @ v) if memory.objective == "dot" else (y - v) @ (y - v))


def inner_gradient(
    weights: Sequence[Array], k: Array, v: Array, memory: MemoryConfig, norm: Norm = None
) -> list[tuple[Array, Array]]:
    """Return the inner loss's gradient as one pair (δ [out], a [in]) a layer, first layer first.

    Layer l's gradient is `δ_l a_{l-1}ᵀ`. Nothing is clipped here: the δ handed to the layer below
    is the unscaled one.
    """
    y, entering, outgoing = mlp(weights, k, memory, norm)
    delta = -v if memory.objective == "dot" else 2.0 * (y - v)
    if memory.norm == "layer":
        delta = layer_norm_backward(delta, outgoing[-1], norm[0])
    pairs = [(delta, entering[-1])]
    for layer in range(len(weights) - 1, 0, -1):
        delta = (weights[layer].T @ delta) * gelu_slope(outgoing[layer - 1])
        pairs.insert(0, (delta, entering[layer - 1]))
    return pairs


def orthogonalized(update: Array) -> Array:
    """Return the update [out, in] with almost equal singular values and its Frobenius norm."""
    size = np.linalg.norm(update)
    if size <= UPDATE_EPS**0.5:
        return update
    left, values, right = np.linalg.svd(update / size, full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):  # a matrix polynomial acts on each singular value
        values = a * values + b * values**3 + c * values**5
    new = left @ np.diag(values) @ right
    return size * new / np.linalg.norm(new)


def clipped(delta: Array, activation: Array, clip: float | None) -> Array:
    """Return `δ aᵀ` [out, in], scaled down to a Frobenius norm of at most `clip`."""
    gradient = np.outer(delta, activation)
    if clip is None:
        return gradient
    size = math.sqrt((delta @ delta) * (activation @ activation) + CLIP_EPS)
    return gradient * (clip / max(clip, size))
