"""The layer's parts that hold parameters."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.config import MCConfig
from mc_jax.numerics import Array, Dtype, align, product, rms_norm, state_dtype

START_MARGIN = 1e-3  # how near to the ends of its range a learned coefficient may start


class Linear(nnx.Module):
    """`x W` without bias, in the dtype of x; starts as Flax's (LeCun's truncated normal)."""

    def __init__(self, into: int, out: int, *, rngs: nnx.Rngs, param_dtype: Dtype):
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (into, out), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Map [..., into] to [..., out]."""
        return x @ self.kernel[...].astype(x.dtype)


class Head(Linear):
    """A linear map whose products accumulate in the state dtype, which it returns."""

    def __call__(self, x: Array) -> Array:
        """Map [b, t, into] to [b, t, out]."""
        return product("btd,ds->bts", x, self.kernel[...], dtype=x.dtype)


class Coefficient(nnx.Module):
    """One write coefficient: constant, or a sigmoid of a head's bias or of the token (section 2).

    Args:
        config: the layer's configuration.
        name: the memory configuration's field, which is also where the coefficient starts.
        rngs: draws the kernel.
        param_dtype: dtype of the parameters.
    """

    def __init__(self, config: MCConfig, name: str, *, rngs: nnx.Rngs, param_dtype: Dtype):
        memory = config.memory
        self.mode = memory.coefficient_mode
        self.start = float(getattr(memory, name))
        self.low, self.high = memory.ranges[name]
        share = (self.start - self.low) / (self.high - self.low)
        share = min(max(share, START_MARGIN), 1 - START_MARGIN)
        self.heads = config.num_heads
        if self.mode == "constant":
            return
        bias = np.full(self.heads, np.log(share) - np.log1p(-share))
        self.bias = nnx.Param(jnp.asarray(bias, param_dtype))
        if self.mode == "token":
            draw = nnx.initializers.normal(0.02)
            self.kernel = nnx.Param(draw(rngs.params(), (config.d_model, self.heads), param_dtype))

    def __call__(self, x: Array) -> Array:
        """Return the coefficient [b, t, h] of tokens [b, t, d], in the state dtype."""
        dtype = state_dtype(x.dtype)
        shape = (*x.shape[:2], self.heads)
        if self.mode == "constant":
            return jnp.full_like(x, self.start, shape=shape, dtype=dtype)
        logit = jnp.broadcast_to(align(self.bias[...].astype(dtype), 3), shape)
        if self.mode == "token":
            logit = logit + product("btd,dh->bth", x, self.kernel[...], dtype=x.dtype)
        return self.low + (self.high - self.low) * jax.nn.sigmoid(logit)


class ShortConv(nnx.Module):
    """Causal depthwise convolution (Titans, section 4.4); starts as the identity."""

    def __init__(self, width: int, features: int, *, param_dtype: Dtype):
        kernel = jnp.zeros((width, features), param_dtype).at[-1].set(1)
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: Array, before: Array | None = None) -> Array:
        """Convolve tokens [b, t, d] over t; `before` [b, width - 1, d], or zero, came first."""
        kernel, t = self.kernel[...].astype(x.dtype), x.shape[1]
        padded = self._joined(x, before)
        taps = [padded[:, i : i + t] * align(tap, 3) for i, tap in enumerate(kernel)]
        return sum(taps[1:], taps[0])

    def tail(self, x: Array, before: Array | None = None, count: Array | None = None) -> Array:
        """Return what comes before the next tokens [b, width - 1, d], in the state dtype.

        Args:
            x: tokens [b, t, d].
            before: what came before them.
            count: tokens of each row, its first ones, int32 [b]; None = all.
        """
        joined = self._joined(x, before).astype(state_dtype(x.dtype))
        if count is None:
            return joined[:, x.shape[1] :]
        width = self.kernel.shape[0]
        index = count[:, None] + align(jnp.arange(width - 1, dtype=count.dtype), 2)
        return jnp.take_along_axis(joined, index[..., None], axis=1)

    def _joined(self, x: Array, before: Array | None) -> Array:
        if before is None:
            return jnp.pad(x, ((0, 0), (self.kernel.shape[0] - 1, 0), (0, 0)))
        return jnp.concatenate([before.astype(x.dtype), x], axis=1)


class RMSNorm(nnx.Module):
    """RMS norm over the last axis, with a learned scale of the given shape."""

    def __init__(self, *shape: int, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))

    def __call__(self, x: Array) -> Array:
        """Normalise `x` [..., *shape]."""
        return rms_norm(x, self.scale[...])


class MemoryNorm(nnx.Module):
    """Gain and bias of a memory's layer norm; ordinary parameters that no inner step writes."""

    def __init__(self, heads: int, width: int, *, param_dtype: Dtype):
        self.scale = nnx.Param(jnp.ones((heads, width), param_dtype))
        self.bias = nnx.Param(jnp.zeros((heads, width), param_dtype))


def split_heads(x: Array, heads: int) -> Array:
    """Bring [b, t, d] to [b, t, h, d / h]."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


def initial_memory(config: MCConfig, rngs: nnx.Rngs, dtype: Dtype) -> list[nnx.Variable]:
    """Return W_0, each [h, out, in]: random or zero, as the memory asks; empty if not learned."""
    memory, h, width = config.memory, config.num_heads, config.head_dim
    if not memory.learns_initial:
        return []
    dims = memory.widths(width, width)
    if not memory.random_initial:
        return [nnx.Param(jnp.zeros((h, out, into), dtype)) for into, out in pairwise(dims)]
    return [
        nnx.Param(
            jax.random.normal(rngs.params(), (h, out, into), dtype) * np.asarray(into**-0.5, dtype)
        )
        for into, out in pairwise(dims)
    ]
