"""Submodules of the layers."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.config import MCConfig
from mc_core.log_linear import LogLinearConfig
from mc_jax.head_copies import HeadCopies
from mc_jax.numerics import Array, Dtype, einsum_f32, expand_leading_dims, rms_norm, state_dtype
from mc_jax.width import gather_width, sharded_param

START_MARGIN = 1e-3  # minimum distance of initial coefficients from the ends, relative to the range


class Linear(nnx.Module):
    """`x W` without bias, in the dtype of x; initialized as in Flax (LeCun normal).

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rngs: random streams; the kernel uses `params`.
        param_dtype: dtype of the kernel.
        axes: names of the kernel's axes; see `mc_jax.sharding.RULES`.
    """

    _takes_copies = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        param_dtype: Dtype,
        axes: tuple[str | None, ...] = (None, None),
    ):
        draw = nnx.initializers.lecun_normal()
        kernel = draw(rngs.params(), (in_features, out_features), param_dtype)
        self.kernel = sharded_param(kernel, *axes)

    def __call__(self, x: Array | HeadCopies) -> Array:
        """Map [..., in] to [..., out]."""
        if isinstance(x, HeadCopies):
            return x.project(gather_width(self.kernel), x.tokens.dtype)
        return x @ gather_width(self.kernel).astype(x.dtype)


class Head(Linear):
    """Linear map that accumulates in the state dtype and returns it."""

    def __call__(self, x: Array | HeadCopies) -> Array:
        """Map [b, t, in] to [b, t, out]."""
        kernel = gather_width(self.kernel)
        if isinstance(x, HeadCopies):
            return x.project(kernel, state_dtype(x.tokens.dtype))
        return einsum_f32("btd,ds->bts", x, kernel, dtype=x.dtype)


class Coefficient(nnx.Module):
    """A write coefficient: constant, or a scaled sigmoid of a bias or of the token (section 2).

    Args:
        config: the layer's configuration.
        name: field of the memory configuration that sets the constant or initial value.
        rngs: random streams; the kernel uses `params`.
        param_dtype: dtype of the parameters.
    """

    _takes_copies = True

    def __init__(
        self,
        config: MCConfig | LogLinearConfig,
        name: str,
        *,
        rngs: nnx.Rngs,
        param_dtype: Dtype,
    ):
        memory = config.memory
        self.mode = memory.coefficient_mode
        self.start = float(getattr(memory, name))
        self.low, self.high = memory.coefficient_range(name)
        fraction = (self.start - self.low) / (self.high - self.low)
        fraction = min(max(fraction, START_MARGIN), 1 - START_MARGIN)
        self.heads = config.num_heads
        if self.mode == "constant":
            return
        bias = np.full(self.heads, np.log(fraction) - np.log1p(-fraction))
        self.bias = sharded_param(jnp.asarray(bias, param_dtype), "heads")
        if self.mode == "token":
            draw = nnx.initializers.normal(0.02)
            kernel = draw(rngs.params(), (config.d_model, self.heads), param_dtype)
            self.kernel = sharded_param(kernel, "embed", "heads")

    def __call__(self, x: Array | HeadCopies) -> Array:
        """Return the coefficient [b, t, h] of tokens [b, t, d], in the state dtype."""
        tokens = x.tokens if isinstance(x, HeadCopies) else x
        dtype = state_dtype(tokens.dtype)
        shape = (*tokens.shape[:2], self.heads)
        if self.mode == "constant":
            return jnp.full_like(tokens, self.start, shape=shape, dtype=dtype)
        logit = jnp.broadcast_to(expand_leading_dims(self.bias[...].astype(dtype), 3), shape)
        if self.mode == "token":
            kernel = gather_width(self.kernel)
            if isinstance(x, HeadCopies):
                logit = logit + x.project(kernel, dtype)
            else:
                logit = logit + einsum_f32("btd,dh->bth", x, kernel, dtype=x.dtype)
        return self.low + (self.high - self.low) * jax.nn.sigmoid(logit)


class ShortConv(nnx.Module):
    """Causal depthwise convolution (Titans, section 4.4), initialized to the identity."""

    def __init__(self, width: int, features: int, *, param_dtype: Dtype):
        kernel = jnp.zeros((width, features), param_dtype).at[-1].set(1)
        self.kernel = sharded_param(kernel, None, "heads")

    def __call__(self, x: Array, before: Array | None = None) -> Array:
        """Convolve tokens [b, t, d] over t, after `before` [b, width - 1, d] or zeros."""
        kernel, t = self.kernel[...].astype(x.dtype), x.shape[1]
        padded = self._with_before(x, before)
        taps = [padded[:, i : i + t] * expand_leading_dims(tap, 3) for i, tap in enumerate(kernel)]
        return sum(taps[1:], taps[0])

    def tail(self, x: Array, before: Array | None = None, count: Array | None = None) -> Array:
        """Return the argument `before` [b, width - 1, d] of the next call, in the state dtype.

        Args:
            x: tokens [b, t, d].
            before: last inputs of the previous call.
            count: number of tokens per row, int32 [b]; later tokens are padding. None = no padding.
        """
        joined = self._with_before(x, before).astype(state_dtype(x.dtype))
        if count is None:
            return joined[:, x.shape[1] :]
        width = self.kernel.shape[0]
        index = count[:, None] + expand_leading_dims(jnp.arange(width - 1, dtype=count.dtype), 2)
        return jnp.take_along_axis(joined, index[..., None], axis=1)

    def _with_before(self, x: Array, before: Array | None) -> Array:
        if before is None:
            return jnp.pad(x, ((0, 0), (self.kernel.shape[0] - 1, 0), (0, 0)))
        return jnp.concatenate([before.astype(x.dtype), x], axis=1)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis, with a learned scale [width] or, per head, [heads, width]."""

    def __init__(self, *shape: int, param_dtype: Dtype):
        axes = ("heads", None) if len(shape) == 2 else (None,)
        self.scale = sharded_param(jnp.ones(shape, param_dtype), *axes)

    def __call__(self, x: Array) -> Array:
        """Normalize `x` [..., *shape]."""
        return rms_norm(x, self.scale[...])


class MemoryNorm(nnx.Module):
    """Gain and bias of a memory's layer norm; not updated by the inner loop."""

    def __init__(self, heads: int, width: int, *, param_dtype: Dtype):
        self.scale = sharded_param(jnp.ones((heads, width), param_dtype), "heads", None)
        self.bias = sharded_param(jnp.zeros((heads, width), param_dtype), "heads", None)


def split_heads(x: Array, heads: int) -> Array:
    """Reshape [b, t, d] to [b, t, h, d / h]."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


def initial_memory(config: MCConfig, rngs: nnx.Rngs, dtype: Dtype) -> list[nnx.Variable]:
    """Return the parameters W_0, each [h, out, in]; empty if they are not learned."""
    memory, h, width = config.memory, config.num_heads, config.head_dim
    if not memory.learns_initial:
        return []
    shapes = [(h, o, i) for i, o in pairwise(memory.widths(width, width))]
    return [
        sharded_param(DRAWS[how](rngs, shape, dtype), "heads", None, None)
        for how, shape in zip(memory.initial_draws(len(shapes)), shapes, strict=True)
    ]


def _zero(rngs: nnx.Rngs, shape: tuple[int, int, int], dtype: Dtype) -> Array:
    return jnp.zeros(shape, dtype)


def _normal(rngs: nnx.Rngs, shape: tuple[int, int, int], dtype: Dtype) -> Array:
    return jax.random.normal(rngs.params(), shape, dtype) * np.asarray(shape[-1] ** -0.5, dtype)


def _orthogonal(rngs: nnx.Rngs, shape: tuple[int, int, int], dtype: Dtype) -> Array:
    """Draw in at least float32, because QR decompositions have no bfloat16."""
    h, o, i = shape
    draw = jax.nn.initializers.orthogonal(max(1.0, o / i) ** 0.5)
    wide = jnp.promote_types(dtype, jnp.float32)
    keys = jax.random.split(rngs.params(), h)
    return jax.vmap(lambda key: draw(key, (o, i), wide))(keys).astype(dtype)


DRAWS = {"zero": _zero, "normal": _normal, "orthogonal": _orthogonal}
