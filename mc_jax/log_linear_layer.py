"""The log-linear attention layer: `log_linear_attention` with projections and norms."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_core.argument_checks import check_inputs
from mc_core.cache_checks import check_cache_options, check_extend_inputs
from mc_core.log_linear import LogLinearConfig, level_count
from mc_jax.backends import Weights
from mc_jax.cache import check_growth, nan_past_capacity
from mc_jax.chunk_layout import first_tokens
from mc_jax.context import TokenSplit, active_split
from mc_jax.head_copies import apply_to, copy_to_heads
from mc_jax.level_cache import LevelCache
from mc_jax.log_linear import (
    LevelTokens,
    extend_levels,
    final_state,
    log_linear_attention,
    prepare_tokens,
)
from mc_jax.mixer import Mixer, extend_rows
from mc_jax.modules import Coefficient, Head
from mc_jax.numerics import (
    Array,
    Dtype,
    expand_leading_dims,
    is_static,
    l2_normalize,
    state_dtype,
)
from mc_jax.sharding import with_auto_axes
from mc_jax.width import sharded_param


class LogLinearAttentionLayer(Mixer):
    """Log-linear attention (arXiv:2506.04761), with the projections of the memory layer.

    The level weights are `softplus(level_scale * level_proj(x))`. `level_scale` starts at 1 and has
    no weight decay.

    Args:
        config: the layer's configuration.
        rngs: random streams; parameters use `params`.
        dtype: compute dtype of matrix products; None = that of the input.
        param_dtype: dtype of the parameters.
    """

    config: LogLinearConfig
    config_class = LogLinearConfig

    def __init__(
        self,
        config: LogLinearConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        coefficient = Coefficient(config, "retention", rngs=rngs, param_dtype=param_dtype)
        self.coefficients = nnx.Dict({"retention": coefficient})
        h, levels = config.num_heads, config.num_levels
        self.level_proj = Head(
            config.d_model,
            h * levels,
            rngs=rngs,
            param_dtype=param_dtype,
            axes=("embed", "heads"),
        )
        self.level_scale = sharded_param(jnp.ones((h, levels), param_dtype), "heads", None)
        self._add_output_norm(param_dtype=param_dtype)

    @with_auto_axes
    def __call__(
        self, x: Array, mask: Array | None = None, *, split: TokenSplit | None = None
    ) -> Array:
        """Mix tokens.

        Args:
            x: [b, t, d], with t at most `config.max_tokens`.
            mask: bool [b, t], False at masked tokens, whose output is 0. They still advance the
                position.
            split: must be None, without a mesh axis `context`.

        Returns:
            [b, t, d] in the dtype of `x`.

        Raises:
            ValueError: an argument has a wrong shape, or the active mesh splits sequences.
        """
        if split := active_split(split):
            raise ValueError(
                f"mixer 'log_linear': cannot split sequences over a mesh with context = "
                f"{split.devices}: set context = 1"
            )
        return self._run(x, mask)[0]

    @with_auto_axes
    def forward_with_cache(self, x: Array, mask: Array | None = None) -> tuple[Array, LevelCache]:
        """Mix tokens x [b, t, d] -> [b, t, d], and return the cache after the last token."""
        y, tokens, conv = self._run(x, mask)
        b, t, _ = x.shape
        cache = LevelCache(
            state=final_state(prepare_tokens(tokens, mask)),
            position=jnp.full(b, t, jnp.int32),
            capacity=jnp.asarray(2 ** (level_count(t) - 1), jnp.int32),
            conv=conv,
        )
        return y, cache

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> LevelCache:
        """Return an empty cache.

        Args:
            batch: number of streams.
            max_tokens: capacity, the maximum number of tokens per stream; `grow` increases it.
            cache_dtype: without effect: every token updates the states, which are at least float32.
            cache_device: without effect, likewise: the states stay on the device.

        Raises:
            ValueError: an argument is out of range.
        """
        del cache_dtype
        check_cache_options(batch, max_tokens, cache_device)
        config, width = self.config, self.config.head_dim
        shape = (batch, config.num_heads, config.slots(max_tokens), width, width)
        return LevelCache(
            state=jnp.zeros(shape, self._state_dtype()),
            position=jnp.zeros(batch, jnp.int32),
            capacity=jnp.asarray(max_tokens, jnp.int32),
            conv=self._init_conv(batch),
        )

    def grow(self, cache: LevelCache, max_tokens: int) -> LevelCache:
        """Return a cache with the same content and a larger capacity.

        Raises:
            ValueError: `max_tokens` is less than the current capacity, or exceeds
                `config.max_tokens`.
        """
        check_growth(cache, max_tokens)
        more = self.config.slots(max_tokens) - cache.state.shape[2]
        state = jnp.pad(cache.state, [(0, 0), (0, 0), (0, max(more, 0)), (0, 0), (0, 0)])
        return cache._replace(state=state, capacity=jnp.full_like(cache.capacity, max_tokens))

    @with_auto_axes
    def extend(
        self,
        x: Array,
        cache: LevelCache,
        mask: Array | None = None,
        *,
        padding: Array | None = None,
    ) -> tuple[Array, LevelCache]:
        """Mix the next tokens of a stream. Any split into calls equals a single full pass.

        Compiles once per number of tokens, for all positions. A compiled program cannot raise: rows
        that exceed the capacity of the cache have output NaN.

        Args:
            x: [b, t, d], t >= 1.
            cache: state before these tokens, from `init_cache`, `extend` or `forward_with_cache`.
            mask: bool [b, t], False at masked tokens, which still advance the position.
            padding: bool [b, t], True at padding, which does not advance the position and has
                output 0. The result of a row does not depend on its padding.

        Returns:
            [b, t, d] in the dtype of `x`, and the cache after these tokens.

        Raises:
            ValueError: an argument has a wrong shape, or the capacity of the cache is exceeded.
        """
        check_extend_inputs(x, cache, LevelCache, self.config, is_static)
        return extend_rows(self._extend, x, cache, mask, padding)

    def _extend(
        self, x: Array, cache: LevelCache, mask: Array | None, count: Array | None = None
    ) -> tuple[Array, LevelCache]:
        """Implement `extend` for right-padded rows of `count` [b] tokens; None = no padding."""
        valid, number = mask, count
        if number is None:
            number = jnp.full_like(cache.position, x.shape[1])
        else:
            valid = first_tokens(number, x.shape[1])
            valid = valid if mask is None else valid & mask
        tokens, conv = self._tokens(self._prepare_inputs(x, valid), cache.conv, count)
        state = cache.state.astype(state_dtype(tokens.q.dtype))
        y, state = extend_levels(
            prepare_tokens(tokens, valid),
            state,
            cache.position,
            number,
            chunk_size=self.config.chunk_size,
        )
        after = cache._replace(state=state, position=cache.position + number, conv=conv)
        y = y.swapaxes(1, 2).astype(tokens.v.dtype)
        if valid is not None:
            y = jnp.where(valid[:, :, None, None], y, jnp.zeros_like(y))
        return self._project_out(nan_past_capacity(y, after), x.dtype), after

    def _run(self, x: Array, mask: Array | None) -> tuple[Array, LevelTokens, Weights]:
        """Return outputs, the arguments of `log_linear_attention`, and the next `conv`."""
        check_inputs(x, mask, self.config.d_model, is_static)
        self.config.check_length("tokens", x.shape[1])
        tokens, conv = self._tokens(self._prepare_inputs(x, mask))
        y = log_linear_attention(*tokens, mask=mask, chunk_size=self.config.chunk_size)
        return self._project_out(y, x.dtype), tokens, conv

    def _tokens(
        self, x: Array, before: Weights = (), count: Array | None = None
    ) -> tuple[LevelTokens, Weights]:
        """Compute the arguments of `log_linear_attention` from tokens.

        Args:
            x: tokens [b, t, d], zero at masked tokens.
            before: field `conv` of the cache.
            count: number of tokens per row, int32 [b]; later tokens are padding. None = no padding.

        Returns:
            q, k, v [b, t, h, k], level weights [b, t, h, l] and retention [b, t, h], and the
            cache's field `conv` after these tokens.
        """
        config = self.config
        copies = copy_to_heads(x, config.num_heads)
        q, k, v, conv = self._qkv(copies, before, count)
        if config.qk_norm == "l2":
            q, k = l2_normalize(q), l2_normalize(k)
        logits = apply_to(self.level_proj, copies)
        logits = logits.reshape(*x.shape[:2], config.num_heads, config.num_levels)
        scale = expand_leading_dims(self.level_scale[...].astype(logits.dtype), 4)
        level_weights = jax.nn.softplus(scale * logits)
        retention = apply_to(self.coefficients["retention"], copies)
        return LevelTokens(q, k, v, level_weights, retention), conv
