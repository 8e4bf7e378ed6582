"""Products, norms and activations with the precision that section 8 of the equations fixes.

Shapes use one legend: b batch, t tokens, d model width, h heads, k key width, v value width,
f hidden width, n segments, c tokens of a chunk or segment, g chunks, e write events of a chunk,
o and i a weight's output and input width. `...` stands for any leading axes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mc_core.config import NORM_EPS

Array = jax.Array
Dtype = Any

KEPT = jax.checkpoint_policies.save_only_these_names("kept")
SUM_BLOCK = 64  # tokens that a running sum adds in one product


def state_dtype(dtype: Dtype) -> Dtype:
    """Return the dtype of memory weights, pools and scores: at least float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def product(spec: str, *operands: Array, dtype: Dtype = None, exact: bool = False) -> Array:
    """Einsum with operands in the compute dtype; accumulates and returns the state dtype.

    Args:
        spec: einsum subscripts.
        operands: the factors, each [...] as `spec` says.
        dtype: compute dtype; None keeps the operands' own.
        exact: full float32 products, where a GPU would round their factors (TF32).
    """
    cast = [x if dtype is None else x.astype(dtype) for x in operands]
    return jnp.einsum(
        spec,
        *cast,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=state_dtype(cast[0].dtype),
    )


def running_sum(x: Array) -> Array:
    """Cumulative sum over the tokens of [..., c, k], in products of triangular blocks."""
    *lead, c, width = x.shape
    block = min(c, SUM_BLOCK)
    blocks = -(-c // block)
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, blocks * block - c), (0, 0)])
    x = x.reshape(*lead, blocks, block, width)
    within = product("ij,...jk->...ik", jnp.tril(jnp.ones((block, block), x.dtype)), x, exact=True)
    if blocks > 1:
        totals = within[..., -1, :]
        within += (running_sum(totals) - totals)[..., None, :]
    return within.reshape(*lead, blocks * block, width)[..., :c, :]


def scale_rows(scale: Array, x: Array) -> Array:
    """Return `scale[..., None] * x` in the dtype of `scale` [..., c]; x is [..., c, i].

    As an einsum, whose gradient by the scale is a product: XLA's CPU takes ten times as long to
    multiply and then sum over rows of 256.
    """
    return jnp.einsum("...c,...ci->...ci", scale, x.astype(scale.dtype), precision="highest")


def align(x: Array, ndim: int) -> Array:
    """Prepend axes of length 1 to x [...] until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def gelu(x: Array) -> Array:
    """Exact (erf) GELU of x [...], elementwise."""
    return x * _normal_cdf(x)


def gelu_slope(x: Array) -> Array:
    """Derivative of the exact GELU at x [...], elementwise."""
    return _normal_cdf(x) + x * _normal_density(x)


@jax.custom_jvp
def _normal_cdf(x: Array) -> Array:
    # erf is one rational function; erfc, of which jax.nn.gelu is made, has two branches and an exp.
    return 0.5 * jax.lax.erf(x * 0.5**0.5) + 0.5


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # JAX 0.12 cannot derive its own erf inside `jax.shard_map`.
    (x,), (change,) = primals, tangents
    return _normal_cdf(x), _normal_density(x) * change


def _normal_density(x: Array) -> Array:
    return jnp.exp(-0.5 * x * x) * (2 * jnp.pi) ** -0.5


def keep(x: Array) -> Array:
    """Mark a product [...] that the backward pass keeps under `jax.checkpoint(policy=KEPT)`."""
    return checkpoint_name(x, "kept")


def l2_normalize(x: Array) -> Array:
    """Scale the last axis of x [..., k] to unit length, computed in the state dtype."""
    x32 = x.astype(state_dtype(x.dtype))
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(squares + NORM_EPS)).astype(x.dtype)


def rms_norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis of x [..., *s]; `scale` has the shape [*s]."""
    x32 = x.astype(state_dtype(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + NORM_EPS)
    return (x32 * inverse * align(scale.astype(x32.dtype), x.ndim)).astype(x.dtype)


def standardize(x: Array) -> tuple[Array, Array]:
    """Return x [..., v] with zero mean and unit variance, and the inverse deviation [..., 1]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPS)
    return centred * inverse, inverse


def is_fixed(size: Any) -> bool:
    """Whether a size is a number: `jax.export` has symbols for dynamic ones."""
    return isinstance(size, int)
