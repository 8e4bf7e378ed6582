"""Pooled keys and gates: how much each memory weighs in a token's read (sections 4 and 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.layout import from_segments, to_segments
from mc_jax.numerics import Array, align, product, running_sum, state_dtype


class Pools(NamedTuple):
    """Pooled keys of segments, and of the online segment as it runs."""

    segment: Array  # [b, n, h, k] after each segment's last token
    running: Array  # [b, t, h, k] of the token's segment, up to and including the token
    length: Array  # real tokens of each segment, int32 [b, n]
    total: Array  # sum of each segment's keys [b, n, h, k]


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


def scores(u: Array, pools: Array, running: Array, config: MCConfig) -> Array:
    """Return `<u_t, m^(i)> / temperature` [b, t, h, n + 1], the online memory last.

    Args:
        u: connectors [b, t, h, k].
        pools: cached pooled keys [b, n, h, k].
        running: the online segment's pooled keys [b, t, h, k].
        config: temperature, and whether gradients reach the cached pools.
    """
    u = u.astype(running.dtype)
    if config.detach_cached_context:
        pools = jax.lax.stop_gradient(pools)
    cached = product("bthk,bnhk->bthn", u, pools, exact=True)
    online = jnp.sum(u * running, axis=-1, keepdims=True)
    return jnp.concatenate([cached, online], axis=-1) / config.softmax_temperature


def select(score: Array, readable: Array, top_k: int) -> Array:
    """Return the `top_k` cached memories of each token under `ssc` (equation 16).

    Args:
        score: [..., n + 1], the online memory last.
        readable: bool, broadcasts to [..., n]; True where a memory is cached already.
        top_k: memories to select.

    Returns:
        [..., min(top_k, n)] indices, the best first, ties in the segments' order; n where too few
        are cached.
    """
    n = score.shape[-1] - 1
    cached = jnp.where(readable, jax.lax.stop_gradient(score[..., :n]), -jnp.inf)
    best, index = jax.lax.top_k(cached, min(top_k, n))
    return jnp.where(best == -jnp.inf, n, index)


def weigh(score: Array, read: Array, config: MCConfig) -> Array:
    """Turn scores into the weights of a read (equations 7, 10, 17).

    Args:
        score: [..., n + 1].
        read: bool [..., n + 1], True where a memory is read; the online memory always is.
        config: the aggregation.
    """
    if config.aggregation in ("none", "residual"):
        return read.astype(score.dtype)
    if config.aggregation == "mean":
        weight = read.astype(score.dtype)
        return weight / jnp.sum(weight, axis=-1, keepdims=True)
    return jax.nn.softmax(jnp.where(read, score, -jnp.inf), axis=-1)


def readable(segment: Array, n: int, config: MCConfig) -> Array:
    """Return bool [..., n + 1]: the memories that tokens of the given segments [...] may read."""
    cached = align(jnp.arange(n, dtype=segment.dtype), segment.ndim + 1) < segment[..., None]
    if config.aggregation == "none":
        cached = jnp.zeros_like(cached)
    return jnp.concatenate([cached, jnp.ones_like(cached, shape=(*segment.shape, 1))], axis=-1)


def gate(score: Array, segment: Array, config: MCConfig) -> tuple[Array, Array | None]:
    """Return the gates of all tokens, and what `ssc` selected.

    Args:
        score: [b, t, h, n + 1].
        segment: [t] or [b, t] each token's segment.
        config: the aggregation.

    Returns:
        gates: [b, t, h, n + 1], 0 where a memory is not read.
        selected: [b, t, h, min(top_k, n)] under `ssc`, else None.
    """
    n = score.shape[-1] - 1
    allowed = readable(segment, n, config)
    allowed = allowed.reshape((1,) * (3 - allowed.ndim) + allowed.shape)[:, :, None]
    allowed = jnp.broadcast_to(allowed, score.shape)
    if config.aggregation != "ssc":
        return weigh(score, allowed, config), None
    selected = select(score, allowed[..., :n], config.ssc_top_k)
    slots = selected[..., :, None] == align(jnp.arange(n, dtype=selected.dtype), selected.ndim + 1)
    read = jnp.concatenate([slots.any(axis=-2), allowed[..., n:]], axis=-1)
    return weigh(score, read, config), selected
