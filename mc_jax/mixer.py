"""Base class of token mixers: projections to and from heads, and padded rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_core.cache_checks import block_caches
from mc_core.checks import check_bool
from mc_core.config import LayerConfig
from mc_jax.backends import Weights
from mc_jax.cache import check_capacity
from mc_jax.chunk_layout import make_packing, pack, unpack
from mc_jax.context import TokenSplit, active_split, convolve
from mc_jax.head_copies import HeadCopies, apply_to
from mc_jax.inspection import Trace
from mc_jax.modules import Linear, RMSNorm, ShortConv, split_heads
from mc_jax.numerics import Array, Dtype, state_dtype
from mc_jax.pretrained import Pretrained


class Mixer(nnx.Module, Pretrained):
    """Projects tokens to q, k and v per head, and the heads' reads to outputs.

    Args:
        config: the layer's configuration.
        projects_u: if True, the connector u is a separate projection.
        rngs: random streams; parameters use `params`.
        dtype: compute dtype of matrix products; None = that of the input.
        param_dtype: dtype of the parameters.
    """

    config: LayerConfig

    def __init__(
        self,
        config: LayerConfig,
        *,
        projects_u: bool = False,
        rngs: nnx.Rngs,
        dtype: Dtype,
        param_dtype: Dtype,
    ):
        self.config = config
        self.dtype = dtype
        d, width = config.d_model, config.conv_width
        kv = config.kv_heads * config.head_dim

        def linear(*axes: str, features: int = d) -> Linear:
            return Linear(d, features, rngs=rngs, param_dtype=param_dtype, axes=axes)

        # The order determines the parameters drawn from a seed.
        self.q_proj = linear("embed", "heads")
        self.k_proj = linear("embed", "heads", features=kv)
        self.v_proj = linear("embed", "heads", features=kv)
        if projects_u:
            self.u_proj = linear("embed", "heads")
        self.out_proj = linear("heads", "embed")
        if width:
            self.q_conv = ShortConv(width, d, param_dtype=param_dtype)
            self.k_conv = ShortConv(width, kv, param_dtype=param_dtype)
            self.v_conv = ShortConv(width, kv, param_dtype=param_dtype)

    def _add_output_norm(self, *, param_dtype: Dtype) -> None:
        """Add the output norm. It must come last: PyTorch optimizers rely on parameter order."""
        config = self.config
        if config.output_norm == "rms":
            shape = config.num_heads, config.head_dim
            self.output_norm = RMSNorm(*shape, param_dtype=param_dtype)

    def _init_conv(self, batch: int) -> Weights:
        """Return the `conv` of an empty cache."""
        if not self.config.conv_width:
            return ()
        shape, kv = (batch, self.config.conv_width - 1), self.config.kv_heads * self.config.head_dim
        widths, dtype = (self.config.d_model, kv, kv), self._state_dtype()
        return tuple(jnp.zeros((*shape, width), dtype) for width in widths)

    def _state_dtype(self) -> Dtype:
        """Return the state dtype of the parameters; projections may be wrapped."""
        return state_dtype(jax.tree.leaves(nnx.state(self, nnx.Param))[0].dtype)

    def _inspect(self, x: Array, mask: Array | None) -> tuple[Array, Trace | None]:
        """Mix tokens, and return the trace of the memory, or None if the mixer has no memory."""
        return self(x, mask), None

    def _prepare_inputs(self, x: Array, mask: Array | None) -> Array:
        """Return tokens [b, t, d] in the compute dtype, zero where `mask` [b, t] is False."""
        x = x if self.dtype is None else x.astype(self.dtype)
        return x if mask is None else jnp.where(mask[:, :, None], x, jnp.zeros_like(x))

    def _qkv(
        self,
        x: Array | HeadCopies,
        before: Weights,
        count: Array | None,
        split: TokenSplit | None = None,
    ) -> tuple[Array, Array, Array, Weights]:
        """Project tokens to q, k and v, and apply the convolutions, if any.

        Args:
            x: tokens [b, t, d], or their copies from `copy_to_heads`.
            before: field `conv` of the cache.
            count: number of tokens per row, int32 [b]; later tokens are padding. None = no padding.
            split: split of a whole sequence over devices; None: that of the active mesh.

        Returns:
            q [b, t, h, k], k and v [b, t, kv_heads, k], and the cache's field `conv` after these
            tokens.
        """
        q, k, v = (apply_to(module, x) for module in (self.q_proj, self.k_proj, self.v_proj))
        tails: Weights = ()
        if self.config.conv_width:
            convs = self.q_conv, self.k_conv, self.v_conv
            old = before or (None, None, None)
            tails = tuple(
                conv.tail(x, b, count) for conv, x, b in zip(convs, (q, k, v), old, strict=True)
            )
            if not before and (split := active_split(split)):
                q, k, v = convolve((q, k, v), [conv.kernel[...] for conv in convs], split)
            else:
                q, k, v = (conv(x, b) for conv, x, b in zip(convs, (q, k, v), old, strict=True))
        q = split_heads(q, self.config.num_heads)
        k, v = (split_heads(x, self.config.kv_heads) for x in (k, v))
        return q, k, v, tails

    def _project_out(self, y: Array, dtype: Dtype) -> Array:
        """Normalize reads [b, t, h, v], merge heads and project to [b, t, d] in `dtype`."""
        if self.config.output_norm == "rms":
            y = self.output_norm(y)
        return self.out_proj(y.reshape(*y.shape[:2], self.config.d_model)).astype(dtype)


def extend_rows(
    extend: Callable[..., tuple[Array, Any]],
    x: Array,
    cache: Any,
    mask: Array | None,
    padding: Array | None,
) -> tuple[Array, Any]:
    """Extend streams by tokens with padding at any position.

    Args:
        extend: function of right-padded tokens, a cache, a mask and, if there is padding, the
            number of tokens per row, int32 [b]. Returns outputs [b, t, ...] and a cache.
        x: tokens [b, t, ...].
        cache: cache of a mixer, or of all blocks of a model.
        mask: bool [b, t], False at masked tokens.
        padding: bool [b, t], True at padding; None = no padding.

    Returns:
        the outputs in the order of the tokens, and the cache after them.

    Raises:
        ValueError: the capacity of the cache is exceeded, or mask or padding have a wrong shape.
    """
    check_bool("mask", mask, x.shape[:2])
    check_bool("padding", padding, x.shape[:2])
    first = block_caches(cache)[0]
    if padding is None:
        check_capacity(first, x.shape[1])
        return extend(x, cache, mask)
    packing = make_packing(padding)
    check_capacity(first, packing.tokens)
    mask = None if mask is None else pack(mask, packing)
    y, cache = extend(pack(x, packing), cache, mask, packing.tokens)
    return unpack(y, packing), cache
