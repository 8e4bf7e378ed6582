"""Pooled keys and gates: how much each memory weighs in a token's read (sections 4 and 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.layout import from_segments, to_segments
from mc_jax.numerics import Array, align, product, running_sum, state_dtype

SCORE_BLOCK = 512  # tokens whose scores stand side by side while memories are selected, at most
_SCORES = 1 << 17  # and their scores: what a core's cache holds
_FEW = 4  # memories that are found by as many maxima


class Pools(NamedTuple):
    """Pooled keys of segments, and of the online segment as it runs."""

    segment: Array  # [b, n, h, k] after each segment's last token
    running: Array  # [b, t, h, k] of the token's segment, up to and including the token
    length: Array  # real tokens of each segment, int32 [b, n]
    total: Array  # sum of each segment's keys [b, n, h, k]


class Gates(NamedTuple):
    """The weights of all tokens' reads; under `ssc`, of the selected memories alone."""

    weights: (
        Array  # [b, t, h, n + 1], the online memory last, 0 where unread; `ssc` [b, t, h, m + 1]
    )
    selected: Array | None  # under `ssc` the memories that they weigh [b, t, h, m], n for none


def pool_keys(k: Array, mask: Array, plan: Plan, pooling: str) -> Pools:
    """Pool the real keys of each segment: their mean (zero if there is none) or their sum.

    Args:
        k: keys [b, t, h, k], zero at masked tokens.
        mask: [b, t] bool.
        plan: the segments.
        pooling: `mean` or `sum`.
    """
    dtype = state_dtype(k.dtype)
    sums = running_sum(to_segments(k.astype(dtype), plan))  # [b, h, n, c, k]
    real = to_segments(mask[:, :, None, None].astype(dtype), plan)
    counts = running_sum(real)[..., 0].astype(jnp.int32)
    pools = pooled(sums, counts, pooling)
    return Pools(
        segment=pools[..., -1, :].swapaxes(1, 2),
        running=from_segments(pools, plan),
        length=counts[:, 0, :, -1],
        total=sums[..., -1, :].swapaxes(1, 2),
    )


def pooled(total: Array, count: Array, pooling: str) -> Array:
    """Turn sums of keys [..., k] and counts [...] into pooled keys."""
    if pooling == "sum":
        return total
    return total / jnp.maximum(count, 1)[..., None].astype(total.dtype)


def scores(u: Array, pools: Array, running: Array, segment: Array, config: MCConfig) -> Array:
    """Return the scores over the temperature [b, t, h, n + 1], the online memory last.

    `<u_t, m^(i)>`, or under `gate="token"` the component of u_t for the memory's level.

    Args:
        u: connectors [b, t, h, k].
        pools: cached pooled keys [b, n, h, k].
        running: the online segment's pooled keys [b, t, h, k].
        segment: [t] or [b, t] each token's segment.
        config: the gate, temperature, and whether gradients reach the cached pools.
    """
    u = u.astype(running.dtype)
    if config.gate == "token":
        age = ages(align(segment, 2), pools.shape[1])[:, :, None]
        cached, online = at_level(u, age), u[..., :1]
    else:
        if config.detach_cached_context:
            pools = jax.lax.stop_gradient(pools)
        cached = product("bthk,bnhk->bthn", u, pools, exact=True)
        online = jnp.sum(u * running, axis=-1, keepdims=True)
    return jnp.concatenate([cached, online], axis=-1) / config.softmax_temperature


def ages(segment: Array, n: int) -> Array:
    """Return [..., n]: by how many segments the given ones [...] are after each cached memory."""
    return segment[..., None] - align(jnp.arange(n, dtype=segment.dtype), segment.ndim + 1)


def at_level(u: Array, age: Array) -> Array:
    """Return the component of u for the level of each cached memory (arXiv:2506.04761).

    Level 0 is the online memory's; 1 + floor(log2(age)) a cached one's, the last one if there are
    fewer components.

    Args:
        u: connectors [..., k].
        age: integers, broadcasts to [..., m]; below 1 where a memory may not be read: any level.

    Returns:
        [..., m].
    """
    bits = 32 - jax.lax.clz(jnp.maximum(age, 0).astype(jnp.int32))
    return jnp.take_along_axis(u, jnp.minimum(bits, u.shape[-1] - 1), axis=-1)


def select(score: Array, readable: Array, top_k: int) -> Array:
    """Return the `top_k` cached memories of each token under `ssc` (equation 16).

    Args:
        score: [..., n], of cached memories.
        readable: bool, broadcasts to [..., n]; True where a memory is cached already.
        top_k: memories to select.

    Returns:
        [..., min(top_k, n)] indices, the best first, ties in the segments' order; n where too few
        are cached.
    """
    n = score.shape[-1]
    left = jnp.where(readable, jax.lax.stop_gradient(score), -jnp.inf)
    if min(top_k, n) > _FEW:
        best, index = jax.lax.top_k(left, min(top_k, n))
        return jnp.where(best == -jnp.inf, n, index)
    # XLA's top-k runs on one core of a CPU, and no mesh splits its rows; maxima have neither fault.
    slot = align(jnp.arange(n, dtype=jnp.int32), left.ndim)
    selected = []
    for _ in range(min(top_k, n)):
        best = jnp.max(left, axis=-1, keepdims=True)
        found = (left == best) & (best > -jnp.inf)
        selected.append(jnp.min(jnp.where(found, slot, n), axis=-1, keepdims=True))
        left = jnp.where(slot == selected[-1], -jnp.inf, left)
    return jnp.concatenate(selected, axis=-1)


def weigh(score: Array, read: Array, config: MCConfig) -> Array:
    """Turn scores into the weights of a read (equations 7, 10, 17).

    Args:
        score: [..., n + 1].
        read: bool [..., n + 1], True where a memory is read; the online memory always is.
        config: the aggregation.
    """
    if not config.gated:
        weight = read.astype(score.dtype)
        if not config.rule.averaged:
            return weight
        return weight / jnp.sum(weight, axis=-1, keepdims=True)
    return jax.nn.softmax(jnp.where(read, score, -jnp.inf), axis=-1)


def readable(segment: Array, n: int, config: MCConfig) -> Array:
    """Return bool [..., n + 1]: the memories that tokens of the given segments [...] may read."""
    cached = ages(segment, n) > 0
    if not config.rule.reads_cache:
        cached = jnp.zeros_like(cached)
    return jnp.concatenate([cached, jnp.ones_like(cached, shape=(*segment.shape, 1))], axis=-1)


def gate(u: Array, pools: Array, running: Array, segment: Array, config: MCConfig) -> Gates:
    """Return the weights of all tokens' reads.

    Args:
        u: connectors [b, t, h, k].
        pools: cached pooled keys [b, n, h, k].
        running: the online segment's pooled keys [b, t, h, k].
        segment: [t] or [b, t] each token's segment.
        config: the aggregation.

    Returns:
        weights [b, t, h, n + 1]; under `ssc` [b, t, h, m + 1] and the memories selected
        [b, t, h, m], m = min(top_k, n).
    """
    if config.rule.sparse:
        return _gate_selected(u, pools, running, align(segment, 2), config)
    score = jnp.zeros_like(running, shape=(*running.shape[:3], pools.shape[1] + 1))
    if config.gated:
        score = scores(u, pools, running, segment, config)
    return Gates(gate_densely(score, segment, config), None)


def _gate_selected(
    u: Array, pools: Array, running: Array, segment: Array, config: MCConfig
) -> Gates:
    """Return the weights of the selected memories; arguments as `gate`'s, segment [b or 1, t].

    1. Select by the scores of all memories, which no gradient needs and no array holds at once.
    2. Score the selected ones again, for the gradients.
    3. Weigh them and the online memory, which is last.

    Of 13 tokens in segments of 4, with `ssc_top_k` = 2, token 5 of segment 1 has one memory to
    select: selected = [0, n], and the weights are those of memory 0, of none (0), and the online
    memory's.
    """
    n = pools.shape[1]
    u = u.astype(running.dtype).swapaxes(1, 2)  # [b, h, t, k]
    if config.detach_cached_context:
        pools = jax.lax.stop_gradient(pools)
    pools = pools.swapaxes(1, 2)  # [b, h, n, k]

    selected = _select_in_blocks(*jax.lax.stop_gradient((u, pools)), segment, config)  # 1

    if config.gate == "token":  # 2
        age = segment[:, None, :, None] - selected.astype(segment.dtype)
        cached = at_level(u, age).swapaxes(1, 2)
        online = u[..., :1].swapaxes(1, 2)
    else:
        slot = jnp.minimum(selected, n - 1).reshape(*u.shape[:2], -1, 1)
        picked = jnp.take_along_axis(pools, slot, axis=2).reshape(*selected.shape, -1)
        cached = product("bhtk,bhtmk->bthm", u, picked, exact=True)
        online = jnp.sum(u.swapaxes(1, 2) * running, axis=-1, keepdims=True)
    score = jnp.concatenate([cached, online], axis=-1) / config.softmax_temperature

    selected = selected.swapaxes(1, 2)  # 3
    read = jnp.concatenate([selected < n, jnp.ones_like(online, dtype=bool)], axis=-1)
    return Gates(weigh(score, read, config), selected)


def _select_in_blocks(u: Array, pools: Array, segment: Array, config: MCConfig) -> Array:
    """Return what tokens [b, h, t, k] select among pools [b, h, n, k]: [b, h, t, min(top_k, n)]."""
    b, h, t, width = u.shape
    segment = jnp.broadcast_to(segment, (b, t))

    def one(block: tuple[Array, Array]) -> Array:
        u, segment = block
        if config.gate == "token":
            score = at_level(u, ages(segment, pools.shape[2])[:, None])
        else:
            score = product("bhtk,bhnk->bhtn", u, pools, exact=True)
        allowed = readable(segment, pools.shape[2], config)[:, None, :, :-1]
        return select(score, allowed, config.ssc_top_k)

    size = max(SCORE_BLOCK // 8, min(SCORE_BLOCK, _SCORES // pools.shape[2]))
    if t <= size:
        return one((u, segment))
    # The scores of all tokens at once would be the largest array of a long sequence.
    blocks = -(-t // size)
    u = jnp.pad(u, [(0, 0), (0, 0), (0, blocks * size - t), (0, 0)])
    segment = jnp.pad(segment, [(0, 0), (0, blocks * size - t)])
    parts = u.reshape(b, h, blocks, size, width), segment.reshape(b, blocks, size)
    selected = jax.lax.map(one, (jnp.moveaxis(parts[0], 2, 0), jnp.moveaxis(parts[1], 1, 0)))
    return jnp.moveaxis(selected, 0, 2).reshape(b, h, blocks * size, -1)[:, :, :t]


def gate_densely(score: Array, segment: Array, config: MCConfig) -> Array:
    """Return the gates of all tokens: the definition, and what `gate` has but for `ssc`.

    Args:
        score: [b, t, h, n + 1].
        segment: [t] or [b, t] each token's segment.
        config: the aggregation.

    Returns:
        [b, t, h, n + 1], 0 where a memory is not read.
    """
    n = score.shape[-1] - 1
    read = readable(align(segment, 2), n, config)[:, :, None]
    if config.rule.sparse:
        selected = select(score[..., :n], read[..., :n], config.ssc_top_k)
        slots = selected[..., :, None] == align(
            jnp.arange(n, dtype=selected.dtype), selected.ndim + 1
        )
        online = jnp.ones_like(score[..., n:], dtype=bool)
        read = jnp.concatenate([slots.any(axis=-2), online], axis=-1)
    return weigh(score, jnp.broadcast_to(read, score.shape), config)


def spread(weights: Array, selected: Array | None, n: int) -> Array:
    """Turn what `gate` returns into gates [b, t, h, n + 1] over all memories."""
    if selected is None:
        return weights
    at = selected[..., None] == align(jnp.arange(n, dtype=selected.dtype), selected.ndim + 1)
    share = weights[..., :-1, None]
    cached = jnp.sum(jnp.where(at, share, jnp.zeros_like(share)), axis=-2)
    return jnp.concatenate([cached, weights[..., -1:]], axis=-1)
