"""The Memory Caching layer: `memory_caching` with projections, write coefficients and norms."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mc_core.argument_checks import check_inputs
from mc_core.cache_checks import check_extend_inputs
from mc_core.config import MCConfig
from mc_core.segmentation import check_streaming_config, make_plan
from mc_jax.backends import Coefficients, Norm, Weights
from mc_jax.cache import Cache, grow, init_cache
from mc_jax.chunk_layout import first_tokens
from mc_jax.context import TokenSplit
from mc_jax.functional import Result, extend, memory_caching
from mc_jax.head_copies import HeadCopies, apply_to, copy_to_heads
from mc_jax.inspection import Trace, make_trace
from mc_jax.mixer import Mixer, extend_rows
from mc_jax.modules import Coefficient, MemoryNorm, initial_memory, split_heads
from mc_jax.numerics import (
    Array,
    Dtype,
    expand_leading_dims,
    is_static,
    l2_normalize,
    normalize_values,
    state_dtype,
)
from mc_jax.sharding import with_auto_axes
from mc_jax.width import sharded_param


class MemoryCachingLayer(Mixer):
    """Memory Caching layer: a recurrent memory with cached states, in place of attention.

    Args:
        config: the layer's configuration.
        rngs: random streams; parameters use `params`.
        dtype: compute dtype of matrix products; None = that of the input.
        param_dtype: dtype of the parameters.

    Example:
        >>> config = MCConfig(d_model=128, num_heads=4, memory=TitansConfig(), segment_size=64)
        >>> layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0))
        >>> y = layer(x)  # [b, t, 128] -> [b, t, 128]
    """

    config: MCConfig
    config_class = MCConfig

    def __init__(
        self,
        config: MCConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
    ):
        super().__init__(
            config, projects_u=config.projects_u, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )
        self.coefficients = nnx.Dict(
            {
                name: Coefficient(config, name, rngs=rngs, param_dtype=param_dtype)
                for name in config.memory.ranges
            }
        )
        if config.has_gate_bias:
            assert config.gate_bias is not None
            bias = jnp.full(config.num_heads, config.gate_bias, param_dtype)
            self.gate_bias = sharded_param(bias, "heads")
        if config.learns_temperature:  # the parameter is its logarithm
            temperature = jnp.zeros(config.num_heads, param_dtype)
            self.gate_temperature = sharded_param(temperature, "heads")
        self.initial = nnx.List(initial_memory(config, rngs, param_dtype))
        if config.memory.has_layer_norm:
            self.memory_norm = MemoryNorm(
                config.num_heads, config.head_dim, param_dtype=param_dtype
            )
        self._add_output_norm(param_dtype=param_dtype)

    @with_auto_axes
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        segment_lengths: Sequence[int] | None = None,
        *,
        split: TokenSplit | None = None,
    ) -> Array:
        """Mix tokens.

        Args:
            x: [b, t, d].
            mask: bool [b, t], False at masked tokens, whose output is 0.
            segment_lengths: explicit segment lengths with sum t.
            split: as in `memory_caching`.

        Returns:
            [b, t, d] in the dtype of `x`.
        """
        return self._run(x, mask, segment_lengths, split=split)[0]

    @with_auto_axes
    def forward_with_cache(self, x: Array, mask: Array | None = None) -> tuple[Array, Cache]:
        """Mix tokens x [b, t, d] -> [b, t, d], and return the cache after the last token."""
        y, result = self._run(x, mask)
        return y, result.cache

    @with_auto_axes
    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace]:
        """Mix tokens x [b, t, d] -> [b, t, d], and return statistics of gates and writes."""
        return self._inspect(x, mask)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> Cache:
        """Return an empty cache.

        Args:
            batch: number of streams.
            max_tokens: capacity, the maximum number of tokens per stream; `grow` increases it.
            cache_dtype: dtype of the cached memories; None = that of the online memory, at least
                float32.
            cache_device: storage of cached memories: `device` or `host`. Reads copy memories from
                the host to the device (under `ssc` only the selected ones).

        Raises:
            ValueError: an argument is out of range, or the segments cannot stream.
        """
        cache = init_cache(
            self._initial(),
            self.config,
            batch,
            max_tokens,
            dtype=self._state_dtype(),
            cache_dtype=cache_dtype,
            cache_device=cache_device,
        )
        return cache._replace(conv=self._init_conv(batch))

    def grow(self, cache: Cache, max_tokens: int) -> Cache:
        """Return a cache with the same content and a larger capacity.

        Raises:
            ValueError: `max_tokens` is less than the current capacity.
        """
        return grow(cache, self.config, max_tokens)

    @with_auto_axes
    def extend(
        self,
        x: Array,
        cache: Cache,
        mask: Array | None = None,
        *,
        padding: Array | None = None,
    ) -> tuple[Array, Cache]:
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
        check_streaming_config(self.config)
        check_extend_inputs(x, cache, Cache, self.config, is_static)
        return extend_rows(self._extend, x, cache, mask, padding)

    def _inspect(self, x: Array, mask: Array | None) -> tuple[Array, Trace]:
        y, result = self._run(x, mask, inspect=True)
        assert result.inner is not None
        plan = make_plan(x.shape[1], self.config)
        return y, make_trace(result.gates, result.cache.segments, result.inner, plan)

    def _extend(
        self, x: Array, cache: Cache, mask: Array | None, count: Array | None = None
    ) -> tuple[Array, Cache]:
        """Implement `extend` for right-padded rows of `count` [b] tokens; None = no padding."""
        valid = mask
        if count is not None:
            valid = first_tokens(count, x.shape[1])
            valid = valid if mask is None else valid & mask
        inputs, conv = self._inputs(self._prepare_inputs(x, valid), cache.conv, count)
        result = extend(**inputs, cache=cache, config=self.config, mask=mask, count=count)
        return self._project_out(result.output, x.dtype), result.cache._replace(conv=conv)

    def _run(
        self,
        x: Array,
        mask: Array | None,
        segment_lengths: Sequence[int] | None = None,
        inspect: bool = False,
        split: TokenSplit | None = None,
    ) -> tuple[Array, Result]:
        check_inputs(x, mask, self.config.d_model, is_static)
        inputs, conv = self._inputs(self._prepare_inputs(x, mask), split=split)
        result = memory_caching(
            **inputs,
            config=self.config,
            mask=mask,
            segment_lengths=segment_lengths,
            inspect=inspect,
            split=split,
        )
        result = result._replace(cache=result.cache._replace(conv=conv))
        return self._project_out(result.output, x.dtype), result

    def _inputs(
        self,
        x: Array,
        before: Weights = (),
        count: Array | None = None,
        split: TokenSplit | None = None,
    ) -> tuple[dict[str, Any], Weights]:
        """Compute the arguments of `memory_caching` from tokens and parameters.

        Args:
            x: tokens [b, t, d], zero at masked tokens.
            before: field `conv` of the cache.
            count: number of tokens per row, int32 [b]; later tokens are padding. None = no padding.
            split: as in `memory_caching`.

        Returns:
            the arguments by name, and the cache's field `conv` after these tokens.
        """
        config = self.config
        copies = copy_to_heads(x, config.num_heads)
        q, k, v, conv = self._qkv(copies, before, count, split)
        if config.normalizes_qk:
            q, k = l2_normalize(q), l2_normalize(k)
        v = normalize_values(v, config.value_norm)
        u, gate_bias = self._gate_inputs(copies, q)
        fields = {name: apply_to(module, copies) for name, module in self.coefficients.items()}
        names = config.memory.coefficient_fields
        coefficients = Coefficients(**{name: fields[field] for name, field in names.items()})
        norm: Norm = None
        if hasattr(self, "memory_norm"):
            norm = (self.memory_norm.scale[...], self.memory_norm.bias[...])
        inputs = {"q": q, "k": k, "v": v, "u": u, "initial": self._initial()}
        return inputs | {"coefficients": coefficients, "norm": norm, "gate_bias": gate_bias}, conv

    def _gate_inputs(self, x: Array | HeadCopies, q: Array) -> tuple[Array | None, Array | None]:
        """Return the connector [b, t, h, k] and the gate bias [h], divided by the temperature.

        Args:
            x: tokens [b, t, d], or their copies.
            q: queries [b, t, h, k].
        """
        config = self.config
        u = q if config.gated else None
        if config.projects_u:
            u = split_heads(apply_to(self.u_proj, x), config.num_heads)
        gate_bias = self.gate_bias[...] if config.has_gate_bias else None
        if u is None or not config.learns_temperature:
            return u, gate_bias
        # A constant temperature divides the scores, which are linear in u and the bias.
        dtype = state_dtype(q.dtype)
        temperature = jnp.exp(self.gate_temperature[...].astype(dtype))
        u = u.astype(dtype) / expand_leading_dims(temperature[:, None], 4)
        return u, None if gate_bias is None else gate_bias.astype(dtype) / temperature

    def _initial(self) -> Weights:
        if len(self.initial):
            return tuple(weight[...] for weight in self.initial)
        h, width = self.config.num_heads, self.config.head_dim
        return (jnp.zeros((h, width, width), jnp.float32),)
