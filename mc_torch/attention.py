"""Causal softmax attention with rotary positions, over all tokens or a window of the last ones."""

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mc_core.arguments import check_inputs
from mc_core.cache_checks import check_cache_options, check_rows
from mc_core.config import AttentionConfig
from mc_torch.backends import Weights
from mc_torch.cache import KVCache, add_slots, check_growth, in_room, put_slots
from mc_torch.host import move_to_host
from mc_torch.mixer import Mixer, extend_rows
from mc_torch.modules import call_hooked
from mc_torch.numerics import Array, Dtype, align, is_fixed, is_transformed, state_dtype


class AttentionLayer(Mixer):
    """Softmax attention: what Memory Caching is compared with, with its projections and its norm.

    The compute dtype of matrix products is autocast's where it is on, else that of the input.

    Args:
        config: the layer's configuration.
        device: where the parameters are.
        dtype: dtype of the parameters.
    """

    config: AttentionConfig
    config_class = AttentionConfig

    def __init__(
        self,
        config: AttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__(config, device=device, dtype=dtype)
        self._add_output_norm(device=device, dtype=dtype)

    def forward(self, x: Array, mask: Array | None = None) -> Array:
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
        at = align(torch.arange(x.shape[1], device=x.device), 2)
        q, k, v, _ = self._project(x, mask, at)
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        if config.window is not None and 2 * config.window < x.shape[1]:
            y = attend_blocks(q, k, v, real, config.window)
        else:
            causal = mask is None and config.window is None
            y = attend(q, k, v, None if causal else visible(at, at, real, config.window))
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
        args = (batch, max_tokens, cache_dtype, cache_device)
        return call_hooked(self, self._init_cache, None, *args)[1]

    def grow(self, cache: KVCache, max_tokens: int) -> KVCache:
        """Return a cache with the same content and room for `max_tokens` tokens.

        Raises:
            ValueError: that is less than it has room for now.
        """
        check_growth(cache, max_tokens)
        keys, values, real = add_slots(cache[:3], self.config.slots(max_tokens))
        limit = torch.full_like(cache.limit, max_tokens)
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

        `torch.compile` of this method compiles once for each number of tokens, whatever the
        position. A compiled program cannot raise: past the cache's limit its output is NaN.

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
        return extend_rows(partial(call_hooked, self, self._extend), x, cache, mask, padding)

    def _init_cache(
        self, x: None, batch: int, max_tokens: int, cache_dtype: Dtype, cache_device: str
    ) -> tuple[None, KVCache]:
        del x
        config, (dtype, device) = self.config, self._state_kind()
        slots = config.slots(max_tokens)
        shape = (batch, slots, config.num_heads, config.head_dim)
        keys, values = torch.zeros((2, *shape), dtype=cache_dtype or dtype, device=device)
        if cache_device == "host":
            keys, values = move_to_host(keys), move_to_host(values)
        cache = KVCache(
            keys=keys,
            values=values,
            real=torch.zeros(batch, slots, dtype=torch.bool, device=device),
            position=torch.zeros(batch, dtype=torch.int32, device=device),
            limit=torch.full((), max_tokens, dtype=torch.int32, device=device),
            conv=self._start_conv(batch),
        )
        return None, cache

    def _extend(
        self, x: Array, cache: KVCache, mask: Array | None, count: Array | None = None
    ) -> tuple[Array, KVCache]:
        """Do the same for tokens that stand on the left of their rows, `count` [b] in each."""
        t, window = x.shape[1], self.config.window
        token = align(torch.arange(t, device=x.device), 2)
        number = torch.full_like(cache.position, t) if count is None else count
        exists = token < number[:, None]
        real = exists if mask is None else exists & mask
        at = cache.position[:, None] + token
        q, k, v, conv = self._project(x, real, at, cache.conv, count)

        slots = cache.real.shape[1]
        kept = exists & (token >= number[:, None] - slots)
        place = torch.where(kept, at % slots, slots)
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
            y = attend(q, keys.to(q.device), values.to(q.device), seen)
        else:
            # What the last tokens overwrote the first ones still see.
            def joined(old: Array, new: Array) -> Array:
                return torch.cat([old.to(new), new], dim=1)

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
            y = torch.where(mask[:, :, None, None], y, torch.zeros_like(y))
        return self._leave(y, dtype)


def attend(q: Array, k: Array, v: Array, seen: Array | None) -> Array:
    """Average values by the softmax of `q·k / sqrt(k)`; scores and softmax in the state dtype.

    Args:
        q: [b, t, h, k].
        k: [b, s, h, k].
        v: [b, s, h, v].
        seen: bool [b or 1, t, s]; None = all up to the token's own place.

    Returns:
        [b, t, h, v] in the dtype of `q`.
    """
    q, k, v = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    seen = None if seen is None else seen[:, None]
    # Under torch.func, the one kernel that has batching rules and derivatives of any order.
    kernel = sdpa_kernel(SDPBackend.MATH) if is_transformed() else nullcontext()
    with kernel:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None)
    return y.transpose(1, 2)


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
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -t % window))
        return x.reshape(b, blocks, window, *x.shape[2:])

    def pairs(x: Array) -> Array:
        x = split(x)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return flat(torch.cat([before, x], dim=2))

    def flat(x: Array) -> Array:
        return x.reshape(b * blocks, *x.shape[2:])

    place = align(torch.arange(2 * window, device=q.device), 2)
    seen = visible(place[:, window:], place, pairs(real), window)
    y = attend(flat(split(q)), pairs(k), pairs(v), seen)
    return y.reshape(b, blocks * window, h, y.shape[-1])[:, :t]


def visible(at: Array, others: Array, real: Array, window: int | None) -> Array:
    """Return which keys a token sees: itself, and real ones before it, in its window.

    Args:
        at: positions of tokens, integers [b or 1, t].
        others: positions of keys, integers [b or 1, s].
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
        at: positions, integers [b or 1, t].
        base: of the frequencies.
    """
    dtype, half = state_dtype(x.dtype), x.shape[-1] // 2
    speed = [base ** (-i / half) for i in range(half)]
    angle = (at[..., None].to(dtype) * align(torch.tensor(speed, dtype=dtype, device=x.device), 3))[
        :, :, None
    ]
    cos, sin = torch.cos(angle), torch.sin(angle)
    one, two = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def _positions(cache: KVCache) -> Array:
    """Return the position of the last token that each slot was meant for; negative before any."""
    slots = cache.real.shape[1]
    last = cache.position[:, None] - 1
    return last - (last - align(torch.arange(slots, device=last.device), 2)) % slots
