"""Causal softmax attention with rotary positions and an optional sliding window."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_core.argument_checks import check_inputs
from mc_core.attention import AttentionConfig
from mc_core.cache_checks import check_cache_options, check_extend_inputs
from mc_jax.backends import Weights
from mc_jax.cache import KVCache, add_slots, check_growth, nan_past_capacity, write_slots
from mc_jax.context import TokenSplit, active_split, block_range, map_blocks, split_blocks
from mc_jax.context_attention import gather_keys, with_window
from mc_jax.head_copies import copy_to_heads
from mc_jax.mixer import Mixer, extend_rows
from mc_jax.numerics import Array, Dtype, einsum_f32, expand_leading_dims, is_static, state_dtype
from mc_jax.offload import move_to_host, read_from_host
from mc_jax.sharding import with_auto_axes


class AttentionLayer(Mixer):
    """Softmax attention baseline, with the projections and output norm of the memory layer.

    Args:
        config: the layer's configuration.
        rngs: random streams; parameters use `params`.
        dtype: compute dtype of matrix products; None = that of the input.
        param_dtype: dtype of the parameters.
    """

    config: AttentionConfig
    config_class = AttentionConfig

    def __init__(
        self,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self._add_output_norm(param_dtype=param_dtype)

    @with_auto_axes
    def __call__(
        self, x: Array, mask: Array | None = None, *, split: TokenSplit | None = None
    ) -> Array:
        """Mix tokens.

        Args:
            x: [b, t, d].
            mask: bool [b, t], False at masked tokens, which are not attended to and have output 0.
                They still advance the position.
            split: split of the tokens over the mesh axis `context`, in whose order they are. None:
                with such an axis, blocks in the order of the sequence.

        Returns:
            [b, t, d] in the dtype of `x`.
        """
        config = self.config
        check_inputs(x, mask, self.config.d_model, is_static)
        positions = expand_leading_dims(jnp.arange(x.shape[1], dtype=jnp.int32), 2)
        if split := active_split(split):
            positions = jnp.asarray(split.positions(x.shape[1]), jnp.int32)[None]
        q, k, v, _ = self._project(x, mask, positions, split=split)
        key_mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
        if split:
            y = attend_split(q, k, v, key_mask, config.window, split)
        elif config.window is not None and 2 * config.window < x.shape[1]:
            y = attend_windowed(q, k, v, key_mask, config.window)
        else:
            y = attend(q, k, v, visible_keys(positions, positions, key_mask, config.window))
        return self._finish(y, mask, x.dtype)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> KVCache:
        """Return an empty cache.

        Args:
            batch: number of streams.
            max_tokens: capacity, the maximum number of tokens per stream; `grow` increases it.
            cache_dtype: dtype of keys and values; None = that of the parameters, at least float32.
            cache_device: storage of keys and values: `device` or `host`. Every call copies them
                from the host to the device.

        Raises:
            ValueError: an argument is out of range.
        """
        check_cache_options(batch, max_tokens, cache_device)
        config = self.config
        slots = config.slots(max_tokens)
        shape = (batch, slots, config.kv_heads, config.head_dim)
        keys, values = (jnp.zeros(shape, cache_dtype or self._state_dtype()) for _ in range(2))
        if cache_device == "host":
            keys, values = move_to_host(keys), move_to_host(values)
        return KVCache(
            keys=keys,
            values=values,
            mask=jnp.zeros((batch, slots), bool),
            position=jnp.zeros(batch, jnp.int32),
            capacity=jnp.asarray(max_tokens, jnp.int32),
            conv=self._init_conv(batch),
        )

    def grow(self, cache: KVCache, max_tokens: int) -> KVCache:
        """Return a cache with the same content and a larger capacity.

        Raises:
            ValueError: `max_tokens` is less than the current capacity.
        """
        check_growth(cache, max_tokens)
        keys, values, mask = add_slots(cache[:3], self.config.slots(max_tokens))
        capacity = jnp.full_like(cache.capacity, max_tokens)
        return cache._replace(keys=keys, values=values, mask=mask, capacity=capacity)

    @with_auto_axes
    def extend(
        self,
        x: Array,
        cache: KVCache,
        mask: Array | None = None,
        *,
        padding: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """Mix the next tokens of a stream. Any split into calls equals a single full pass.

        Compiles once per number of tokens, for all positions. A compiled program cannot raise: rows
        that exceed the capacity of the cache have output NaN.

        Args:
            x: [b, t, d], t >= 1.
            cache: state before these tokens, from `init_cache` or `extend`.
            mask: bool [b, t], False at masked tokens, which still advance the position.
            padding: bool [b, t], True at padding, which does not advance the position and has
                output 0. The result of a row does not depend on its padding.

        Returns:
            [b, t, d] in the dtype of `x`, and the cache after these tokens.

        Raises:
            ValueError: an argument has a wrong shape, or the capacity of the cache is exceeded.
        """
        check_extend_inputs(x, cache, KVCache, self.config, is_static)
        return extend_rows(self._extend, x, cache, mask, padding)

    def _extend(
        self, x: Array, cache: KVCache, mask: Array | None, count: Array | None = None
    ) -> tuple[Array, KVCache]:
        """Implement `extend` for right-padded rows of `count` [b] tokens; None = no padding."""
        b, t, window = *x.shape[:2], self.config.window
        token = expand_leading_dims(jnp.arange(t, dtype=jnp.int32), 2)
        number = jnp.full(b, t, jnp.int32) if count is None else count
        valid = token < number[:, None]
        mask = valid if mask is None else valid & mask
        positions = cache.position[:, None] + token
        q, k, v, conv = self._project(x, mask, positions, cache.conv, count)

        slots = cache.mask.shape[1]
        stored = valid & (token >= number[:, None] - slots)
        slot = jnp.where(stored, positions % slots, slots)
        keys, values, cache_mask = write_slots(cache[:3], (k, v, mask), slot)
        after = cache._replace(
            keys=keys,
            values=values,
            mask=cache_mask,
            position=cache.position + number,
            conv=conv,
        )
        if window is None or t == 1:
            visible = visible_keys(positions, _slot_positions(after), cache_mask, window)
            keys, values = (read_from_host(jnp.asarray, x) for x in (keys, values))
            y = attend(q, keys, values, visible)
        else:
            # The first tokens still attend to keys that the last tokens overwrite.
            def with_cached(old: Array, new: Array) -> Array:
                old = read_from_host(jnp.asarray, old).astype(new.dtype)
                return jnp.concatenate([old, new], axis=1)

            key_positions = with_cached(_slot_positions(cache), positions)
            visible = visible_keys(positions, key_positions, with_cached(cache.mask, mask), window)
            y = attend(q, with_cached(cache.keys, k), with_cached(cache.values, v), visible)
        return self._finish(nan_past_capacity(y, after), mask, x.dtype), after

    def _project(
        self,
        x: Array,
        mask: Array | None,
        positions: Array,
        before: Weights = (),
        count: Array | None = None,
        split: TokenSplit | None = None,
    ) -> tuple[Array, Array, Array, Weights]:
        """Return q, k and v of tokens at `positions` [b or 1, t], and the next `conv`."""
        copies = copy_to_heads(self._prepare_inputs(x, mask), self.config.num_heads)
        q, k, v, conv = self._qkv(copies, before, count, split)
        q, k = (apply_rope(x, positions, self.config.rope_base) for x in (q, k))
        return q, k, v, conv

    def _finish(self, y: Array, mask: Array | None, dtype: Dtype) -> Array:
        if mask is not None:
            y = jnp.where(mask[:, :, None, None], y, jnp.zeros_like(y))
        return self._project_out(y, dtype)


def attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Softmax attention, with scores and softmax in the state dtype.

    Args:
        q: [b, t, h, k].
        k: [b, s, g, k]; g divides h, and consecutive heads of q share a head of k and v.
        v: [b, s, g, v].
        visible: bool [b or 1, t, s].

    Returns:
        [b, t, h, v] in the dtype of `q`.
    """
    if q.shape[2] != k.shape[2]:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    # jax.nn.dot_product_attention computes its softmax in float32 even for float64 inputs.
    scores = einsum_f32("bthk,bshk->bhts", q, k, dtype=q.dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None], scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    return einsum_f32("bhts,bshv->bthv", probabilities, v, dtype=q.dtype).astype(q.dtype)


def attend_windowed(q: Array, k: Array, v: Array, key_mask: Array, window: int) -> Array:
    """Sliding-window attention over a whole sequence, in blocks of the window's size.

    The tokens of a block attend to their own block and the previous one.

    Args:
        q: [b, t, h, k].
        k: [b, t, g, k], as in `attend`.
        v: [b, t, g, v].
        key_mask: bool [b, t].
        window: number of tokens that a token attends to.

    Returns:
        [b, t, h, v].
    """
    b, t, h, _ = q.shape
    blocks = -(-t // window)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -t % window), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(b, blocks, window, *x.shape[2:])

    def pairs(x: Array) -> Array:
        x = split(x)
        before = jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
        return flat(jnp.concatenate([before, x], axis=2))

    def flat(x: Array) -> Array:
        return x.reshape(b * blocks, *x.shape[2:])

    block_positions = expand_leading_dims(jnp.arange(2 * window, dtype=jnp.int32), 2)
    visible = visible_keys(block_positions[:, window:], block_positions, pairs(key_mask), window)
    y = attend(flat(split(q)), pairs(k), pairs(v), visible)
    return y.reshape(b, blocks * window, h, y.shape[-1])[:, :t]


@partial(jax.jit, static_argnames=("window", "split"))
def attend_split(
    q: Array, k: Array, v: Array, key_mask: Array, window: int | None, split: TokenSplit
) -> Array:
    """Attention over tokens that are split over devices.

    All keys and values are gathered, or those of a window exchanged between neighbouring blocks.

    Args:
        q: [b, t, h, k], in the order of the split.
        k: [b, t, h, k].
        v: [b, t, h, v].
        key_mask: bool [b, t].
        window: number of tokens that a token attends to; None = all.
        split: the split of the tokens.

    Returns:
        [b, t, h, v] in the dtype of `q`.

    Raises:
        ValueError: the tokens cannot be split into equal blocks.
    """
    split.check(q.shape[1])
    size, reach = q.shape[1] // split.blocks, (window or 1) - 1

    def attend_all(blocks: Array, tokens: Any, _: Any) -> Array:
        q, k, v, mask = tokens
        k, v, mask = gather_keys(k, v, mask, split)
        positions = block_range(blocks, size)[None]
        every = expand_leading_dims(jnp.arange(k.shape[1], dtype=jnp.int32), 2)
        return attend(q, k, v, visible_keys(positions, every, mask, window))

    def attend_near(blocks: Array, tokens: Any, _: Any) -> Array:
        assert window is not None
        q, k, v, mask = tokens
        k, v, mask = with_window(k, v, mask, blocks, reach, split)
        q = split_blocks(q, blocks)
        # Queries of the tokens before a block are ignored.
        q = jnp.pad(q, [(0, 0), (0, 0), (reach, 0), (0, 0), (0, 0)])
        q, k, v, mask = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v, mask))
        y = attend_windowed(q, k, v, mask, window)[:, reach:]
        return y.reshape(-1, blocks.size * size, *y.shape[2:])

    body = attend_near if 0 < reach <= size else attend_all
    return map_blocks(body, split, (q, k, v, key_mask))


def visible_keys(
    positions: Array, key_positions: Array, key_mask: Array, window: int | None
) -> Array:
    """Return the attention mask: a token attends to itself and to unmasked tokens in its window.

    Args:
        positions: of tokens, int32 [b or 1, t].
        key_positions: of keys, int32 [b or 1, s].
        key_mask: bool [b, s].
        window: number of most recent tokens, including the current one, that a token attends to;
            None = all.

    Returns:
        bool [b, t, s].
    """
    distance = positions[:, :, None] - key_positions[:, None]
    inside = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return inside & (key_mask[:, None] | (distance == 0))


def apply_rope(x: Array, positions: Array, base: float) -> Array:
    """Rotate the pairs (i, i + k/2) of each head by `position * base ** (-2i / k)` radians.

    Args:
        x: [b, t, h, k].
        positions: of tokens, int32 [b or 1, t].
        base: base of the frequencies.
    """
    dtype, half = state_dtype(x.dtype), x.shape[-1] // 2
    frequency = jnp.asarray([base ** (-i / half) for i in range(half)], dtype)
    angle = (positions[..., None].astype(dtype) * expand_leading_dims(frequency, 3))[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _slot_positions(cache: KVCache) -> Array:
    """Return the position of the last token of each slot; negative for an empty slot."""
    slots = cache.mask.shape[1]
    last = cache.position[:, None] - 1
    return last - (last - expand_leading_dims(jnp.arange(slots, dtype=jnp.int32), 2)) % slots
