"""Matrix products, norms and activations, in the precision of section 8 of the equations.

Dimensions: b batch, t tokens, d model width, h heads, k key width, v value width,
f hidden width, n segments, c tokens of a chunk or segment, g chunks, e rank-one updates of a
chunk, o and i output and input width of a weight. `...` are any leading axes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mc_core.config import NORM_EPS, UPDATE_EPS
from mc_core.memory_kinds import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS

Array = jax.Array
Dtype = Any

SAVE_POLICY = jax.checkpoint_policies.save_only_these_names("saved")
SUM_BLOCK = 64  # tokens per block of a running sum


def state_dtype(dtype: Dtype) -> Dtype:
    """Return the dtype of memory weights, pools and scores: at least float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def einsum_f32(spec: str, *operands: Array, dtype: Dtype = None, exact: bool = False) -> Array:
    """Einsum of operands in the compute dtype, accumulated and returned in the state dtype.

    Args:
        spec: einsum subscripts.
        operands: arrays [...] with the axes of `spec`.
        dtype: compute dtype; None = the dtypes of the operands.
        exact: do not round float32 operands to TF32 on a GPU.
    """
    cast = [x if dtype is None else x.astype(dtype) for x in operands]
    return jnp.einsum(
        spec,
        *cast,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=state_dtype(cast[0].dtype),
    )


def running_sum(x: Array) -> Array:
    """Cumulative sum over the tokens of [..., c, k], as products with triangular matrices."""
    *lead, c, width = x.shape
    block = min(c, SUM_BLOCK)
    blocks = -(-c // block)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, blocks * block - c), (0, 0)])
    x = x.reshape(*lead, blocks, block, width)
    within = einsum_f32(
        "ij,...jk->...ik", jnp.tril(jnp.ones((block, block), x.dtype)), x, exact=True
    )
    if blocks > 1:
        totals = within[..., -1, :]
        within += (running_sum(totals) - totals)[..., None, :]
    return within.reshape(*lead, blocks * block, width)[..., :c, :]


def scale_rows(scale: Array, x: Array) -> Array:
    """Return `scale[..., None] * x` in the dtype of `scale` [..., c]; x is [..., c, i]."""
    return scale[..., None] * x.astype(scale.dtype)


def expand_leading_dims(x: Array, ndim: int) -> Array:
    """Prepend axes of length 1 to x [...] until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU of x [...]."""
    return x * _normal_cdf(x)


def gelu_slope(x: Array) -> Array:
    """Derivative of the exact GELU at x [...]."""
    return _normal_cdf(x) + x * _normal_density(x)


@jax.custom_jvp
def _normal_cdf(x: Array) -> Array:
    # perf(cpu): erf is one rational function; erfc (in jax.nn.gelu) has two branches and an exp.
    return 0.5 * jax.lax.erf(x * 0.5**0.5) + 0.5


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX 0.12 cannot differentiate erf inside `jax.shard_map`.
    (x,), (change,) = primals, tangents
    return _normal_cdf(x), _normal_density(x) * change


def _normal_density(x: Array) -> Array:
    return jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


def save_for_backward(x: Array) -> Array:
    """Save a product [...] for the backward pass under `jax.checkpoint(policy=SAVE_POLICY)`."""
    return checkpoint_name(x, "saved")


def l2_normalize(x: Array) -> Array:
    """Normalize the last axis of x [..., k] to unit L2 norm, computed in the state dtype."""
    x32 = x.astype(state_dtype(x.dtype))
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(squares + NORM_EPS)).astype(x.dtype)


def rms_norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis of x [..., *s]; `scale` has the shape [*s]."""
    x32 = x.astype(state_dtype(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPS)
    return (x32 * inverse * expand_leading_dims(scale.astype(x32.dtype), x.ndim)).astype(x.dtype)


def normalize_values(v: Array, norm: str) -> Array:
    """Normalize the last axis of v [..., v] to unit L2 norm (`l2`) or unit RMS (`rms`)."""
    if norm == "none":
        return v
    return l2_normalize(v) if norm == "l2" else rms_norm(v, jnp.ones(v.shape[-1:], v.dtype))


def standardize(x: Array) -> tuple[Array, Array]:
    """Return x [..., v] with zero mean and unit variance, and 1 / standard deviation [..., 1]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS)
    return centred * inverse, inverse


def orthogonalize(x: Array) -> Array:
    """Return matrices with the singular vectors and the Frobenius norm of x [..., o, i].

    Newton-Schulz iterations make all singular values almost equal; those below 0.2% of the norm
    remain smaller. Matrices of norm 1e-6 or less are returned unchanged: at zero, the gradient
    would otherwise be infinite.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    squares = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    small = squares <= UPDATE_EPS
    norm = jnp.sqrt(jnp.where(small, 1, squares))
    unit = x / norm
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = einsum_f32("...oi,...pi->...op", unit, unit)
        factor = cubic * gram + quintic * einsum_f32("...op,...pq->...oq", gram, gram)
        unit = linear * unit + einsum_f32("...op,...pi->...oi", factor, unit)
    squares = jnp.sum(unit * unit, axis=(-2, -1), keepdims=True)
    return jnp.where(small, x, unit * (norm / jnp.sqrt(jnp.where(small, 1, squares))))


def is_static(size: Any) -> bool:
    """Return True if a size is a number, not a symbol of `jax.export`."""
    return isinstance(size, int)
