"""Causal softmax attention with rotary positions, over all tokens or a window of the last ones."""

import jax
import jax.numpy as jnp
from flax import nnx

from mc_core.arguments import check_inputs
from mc_core.cache_checks import check_cache_options, check_rows
from mc_core.config import AttentionConfig
from mc_jax.backends import Weights
from mc_jax.cache import KVCache, add_slots, check_growth, in_room, put_slots
from mc_jax.host import move_to_host, take
from mc_jax.mixer import Mixer, extend_rows
from mc_jax.numerics import Array, Dtype, align, is_fixed, product, state_dtype


class AttentionLayer(Mixer):
    """Softmax attention: what Memory Caching is compared with, with its projections and its norm.

    Args:
        config: the layer's configuration.
        rngs: draws the parameters (stream `params`).
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

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Mix tokens.

        Args:
            x: [b, t, d].
            mask: bool [b, t], True = a real token. A masked one is not seen, and its output is 0;
                its position counts.

        Returns:
            [b, t, d] in the dtype of `x`.
        """
        config = self.config
        check_inputs(x, mask, self.config.d_model, is_fixed)
        at = align(jnp.arange(x.shape[1], dtype=jnp.int32), 2)
        q, k, v, _ = self._project(x, mask, at)
        real = jnp.ones(x.shape[:2], bool) if mask is None else mask
        if config.window is not None and 2 * config.window < x.shape[1]:
            y = attend_blocks(q, k, v, real, config.window)
        else:
            y = attend(q, k, v, visible(at, at, real, config.window))
        return self._finish(y, mask, x.dtype)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> KVCache:
        """Return the cache of streams that have not begun.

        Args:
            batch: number of streams.
            max_tokens: the most tokens that a stream may have; `grow` makes room for more.
            cache_dtype: of keys and values; None = that of the parameters, at least float32.
            cache_device: `device`, or `host`: keys and values lie in the host's memory, and a call
                moves all of them.

        Raises:
            ValueError: a number is not positive.
        """
        check_cache_options(batch, max_tokens, cache_device)
        config = self.config
        slots = config.slots(max_tokens)
        shape = (batch, slots, config.num_heads, config.head_dim)
        keys, values = (jnp.zeros(shape, cache_dtype or self._state_dtype()) for _ in range(2))
        if cache_device == "host":
            keys, values = move_to_host(keys), move_to_host(values)
        return KVCache(
            keys=keys,
            values=values,
            real=jnp.zeros((batch, slots), bool),
            position=jnp.zeros(batch, jnp.int32),
            limit=jnp.asarray(max_tokens, jnp.int32),
            conv=self._start_conv(batch),
        )

    def grow(self, cache: KVCache, max_tokens: int) -> KVCache:
        """Return a cache with the same content and room for `max_tokens` tokens.

        Raises:
            ValueError: that is less than it has room for now.
        """
        check_growth(cache, max_tokens)
        keys, values, real = add_slots(cache[:3], self.config.slots(max_tokens))
        limit = jnp.full_like(cache.limit, max_tokens)
        return cache._replace(keys=keys, values=values, real=real, limit=limit)

    def extend(
        self,
        x: Array,
        cache: KVCache,
        mask: Array | None = None,
        *,
        padding: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """Mix the next tokens of a stream; any split of a sequence gives what the whole gives.

        Compiled once for each number of tokens, whatever the position. A compiled program cannot
        raise: past the cache's limit its output is NaN.

        Args:
            x: [b, t, d], one token or more.
            cache: the stream so far, from `init_cache` or `extend`.
            mask: bool [b, t], True = a real token; a masked one still takes its position.
            padding: bool [b, t], True where a row has no token at all: each row gives what it gives
                alone without that place, whose output is 0.

        Returns:
            [b, t, d] in the dtype of `x`, and the stream with these tokens.

        Raises:
            ValueError: a shape that does not fit, or tokens that the cache has no room for.
        """
        check_rows(x, cache, KVCache, self.config, is_fixed)
        return extend_rows(self._extend, x, cache, mask, padding)

    def _extend(
        self, x: Array, cache: KVCache, mask: Array | None, count: Array | None = None
    ) -> tuple[Array, KVCache]:
        """Do the same for tokens that stand on the left of their rows, `count` [b] in each."""
        b, t, window = *x.shape[:2], self.config.window
        token = align(jnp.arange(t, dtype=jnp.int32), 2)
        number = jnp.full(b, t, jnp.int32) if count is None else count
        exists = token < number[:, None]
        real = exists if mask is None else exists & mask
        at = cache.position[:, None] + token
        q, k, v, conv = self._project(x, real, at, cache.conv, count)

        slots = cache.real.shape[1]
        kept = exists & (token >= number[:, None] - slots)
        place = jnp.where(kept, at % slots, slots)
        keys, values, held = put_slots(cache[:3], (k, v, real), place)
        after = cache._replace(
            keys=keys,
            values=values,
            real=held,
            position=cache.position + number,
            conv=conv,
        )
        if window is None or t == 1:
            seen = visible(at, _positions(after), held, window)
            y = attend(q, take(jnp.asarray, keys), take(jnp.asarray, values), seen)
        else:
            # What the last tokens overwrote the first ones still see.
            def joined(old: Array, new: Array) -> Array:
                return jnp.concatenate([take(jnp.asarray, old).astype(new.dtype), new], axis=1)

            where = joined(_positions(cache), at)
            seen = visible(at, where, joined(cache.real, real), window)
            y = attend(q, joined(cache.keys, k), joined(cache.values, v), seen)
        return self._finish(in_room(y, after), real, x.dtype), after

    def _project(
        self,
        x: Array,
        mask: Array | None,
        at: Array,
        before: Weights = (),
        count: Array | None = None,
    ) -> tuple[Array, Array, Array, Weights]:
        """Return q, k and v of tokens at positions `at` [b or 1, t], and the cache's `conv`."""
        q, k, v, conv = self._qkv(self._enter(x, mask), before, count)
        return rotate(q, at, self.config.rope_base), rotate(k, at, self.config.rope_base), v, conv

    def _finish(self, y: Array, mask: Array | None, dtype: Dtype) -> Array:
        if mask is not None:
            y = jnp.where(mask[:, :, None, None], y, jnp.zeros_like(y))
        return self._leave(y, dtype)


def attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """Average values by the softmax of `q·k / sqrt(k)`; scores and softmax in the state dtype.

    Args:
        q: [b, t, h, k].
        k: [b, s, h, k].
        v: [b, s, h, v].
        seen: bool [b or 1, t, s].

    Returns:
        [b, t, h, v] in the dtype of `q`.
    """
    # jax.nn.dot_product_attention takes its softmax in float32 even where all else is float64.
    scores = product("bthk,bshk->bhts", q, k, dtype=q.dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
    share = jax.nn.softmax(scores, axis=-1)
    return product("bhts,bshv->bthv", share, v, dtype=q.dtype).astype(q.dtype)


def attend_blocks(q: Array, k: Array, v: Array, real: Array, window: int) -> Array:
    """Attend to a window of a whole sequence: blocks of its size see themselves and one before.

    Args:
        q: [b, t, h, k], as k.
        k: as q.
        v: [b, t, h, v].
        real: bool [b, t].
        window: tokens that a token sees.

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

    place = align(jnp.arange(2 * window, dtype=jnp.int32), 2)
    seen = visible(place[:, window:], place, pairs(real), window)
    y = attend(flat(split(q)), pairs(k), pairs(v), seen)
    return y.reshape(b, blocks * window, h, y.shape[-1])[:, :t]


def visible(at: Array, others: Array, real: Array, window: int | None) -> Array:
    """Return which keys a token sees: itself, and real ones before it, in its window.

    Args:
        at: positions of tokens, int32 [b or 1, t].
        others: positions of keys, int32 [b or 1, s].
        real: bool [b, s].
        window: tokens that a token sees, itself included; None = all.

    Returns:
        bool [b, t, s].
    """
    back = at[:, :, None] - others[:, None]
    inside = back >= 0 if window is None else (back >= 0) & (back < window)
    return inside & (real[:, None] | (back == 0))


def rotate(x: Array, at: Array, base: float) -> Array:
    """Turn the pairs (i, i + k/2) of each head by `position * base ** (-2i / k)`, in radians.

    Args:
        x: [b, t, h, k].
        at: positions, int32 [b or 1, t].
        base: of the frequencies.
    """
    dtype, half = state_dtype(x.dtype), x.shape[-1] // 2
    speed = jnp.asarray([base ** (-i / half) for i in range(half)], dtype)
    angle = (at[..., None].astype(dtype) * align(speed, 3))[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    one, two = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1).astype(x.dtype)


def _positions(cache: KVCache) -> Array:
    """Return the position of the last token that each slot was meant for; negative before any."""
    slots = cache.real.shape[1]
    last = cache.position[:, None] - 1
    return last - (last - align(jnp.arange(slots, dtype=jnp.int32), 2)) % slots
