"""Pooled keys, and gates: the weight of each memory in a token's read (sections 4 and 5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.chunk_layout import from_segments, to_segments
from mc_jax.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    l2_normalize,
    running_sum,
    state_dtype,
)

SCORE_BLOCK = 512  # maximum number of tokens per block of the top-k selection
_MAX_SCORES = 1 << 17  # perf(cpu): maximum number of scores per block, to fit in the CPU cache
_MAX_UNROLL = 4  # largest top-k that is computed without a loop


class Pools(NamedTuple):
    """Pooled keys of segments, and running pooled keys of the online segment."""

    segment: Array  # [b, n, h, k] after each segment's last token
    running: Array  # [b, t, h, k] of the token's segment, up to and including the token
    length: Array  # number of unmasked tokens per segment, int32 [b, n]
    total: Array  # sum of each segment's keys [b, n, h, k]


class Gates(NamedTuple):
    """Weights of the memories in each token's read; under `ssc`, only of the selected memories."""

    weights: Array  # [b, t, h, n + 1], the online memory last; under `ssc` [b, t, h, m + 1]
    selected: Array | None  # under `ssc`, indices of the selected memories [b, t, h, m]; n = unused


def pool_keys(k: Array, mask: Array, plan: Plan, config: MCConfig) -> Pools:
    """Pool the unmasked keys of each segment.

    Args:
        k: keys [b, t, h, k], zero at masked tokens.
        mask: [b, t] bool.
        plan: the segments.
        config: pooling and norm.
    """
    dtype = state_dtype(k.dtype)
    sums = running_sum(to_segments(k.astype(dtype), plan))  # [b, h, n, c, k]
    token_mask = to_segments(mask[:, :, None, None].astype(dtype), plan)
    counts = running_sum(token_mask)[..., 0].astype(jnp.int32)
    pools = finish_pooling(sums, counts, config)
    return Pools(
        segment=pools[..., -1, :].swapaxes(1, 2),
        running=from_segments(pools, plan),
        length=counts[:, 0, :, -1],
        total=sums[..., -1, :].swapaxes(1, 2),
    )


def finish_pooling(total: Array, count: Array, config: MCConfig) -> Array:
    """Return pooled keys from sums of keys [..., k] and counts [...].

    They are the mean (zero if the count is 0) or the sum, with `pool_norm="l2"` of unit norm.
    """
    pools = total
    if config.pooling == "mean":
        pools = total / jnp.maximum(count, 1)[..., None].astype(total.dtype)
    return l2_normalize(pools) if config.pool_norm == "l2" else pools


def gate_scores(
    u: Array,
    pools: Array,
    running: Array,
    segment: Array,
    config: MCConfig,
    bias: Array | None = None,
) -> Array:
    """Return the scores divided by the temperature [b, t, h, n + 1], the online memory last.

    A score is `<u_t, m^(i)>`, or under `gate="token"` the component of u_t for the memory's level.
    The bias is added to the online memory's score before the division.

    Args:
        u: connectors [b, t, h, k].
        pools: cached pooled keys [b, n, h, k].
        running: the online segment's pooled keys [b, t, h, k].
        segment: [t] or [b, t] segment of each token.
        config: gate, temperature and `detach_cached_context`.
        bias: [h]; None = 0.
    """
    u = u.astype(running.dtype)
    if config.gate == "token":
        age = memory_ages(expand_leading_dims(segment, 2), pools.shape[1], config)[:, :, None]
        cached = level_score(u, age)
    else:
        if config.detach_cached_context:
            pools = jax.lax.stop_gradient(pools)
        cached = einsum_f32("bthk,bnhk->bthn", u, pools, exact=True)
    return append_online_score(cached, u, running, config, bias)


def append_online_score(
    cached: Array, u: Array, running: Array, config: MCConfig, bias: Array | None
) -> Array:
    """Append the online memory's score to scores [b, t, h, n], and divide by the temperature.

    Takes u and running [b, t, h, k] and bias [h] as in `gate_scores`; returns [b, t, h, n + 1].
    """
    online = u[..., :1]
    if config.gate == "context":
        online = jnp.sum(u * running, axis=-1, keepdims=True)
    online = _add_bias(online, bias)
    return jnp.concatenate([cached, online], axis=-1) / config.score_divisor


def segment_ages(segment: Array, n: int) -> Array:
    """Return the ages [..., n] of n cached memories relative to segments [...], in segments."""
    return segment[..., None] - expand_leading_dims(
        jnp.arange(n, dtype=segment.dtype), segment.ndim + 1
    )


def memory_ages(segment: Array, n: int, config: MCConfig) -> Array:
    """Return the ages [..., n] by which `level_score` finds the levels of n cached memories.

    Buckets have fixed levels, so that the age of the bucket of 2^e segments is 2^e.
    """
    if not config.has_buckets:
        return segment_ages(segment, n)
    sizes = 2 ** jnp.arange(n, dtype=segment.dtype)
    return jnp.broadcast_to(expand_leading_dims(sizes, segment.ndim + 1), (*segment.shape, n))


def level_score(u: Array, age: Array) -> Array:
    """Return the component of u for the level of each cached memory (arXiv:2506.04761).

    The online memory has level 0. A cached memory has level 1 + floor(log2(age)), at most k - 1.

    Args:
        u: connectors [..., k].
        age: integers, broadcasts to [..., m]; the level of an age below 1 is unspecified.

    Returns:
        [..., m].
    """
    bits = 32 - jax.lax.clz(jnp.maximum(age, 0).astype(jnp.int32))
    return jnp.take_along_axis(u, jnp.minimum(bits, u.shape[-1] - 1), axis=-1)


def select_top_k(score: Array, allowed: Array, top_k: int) -> Array:
    """Select the `top_k` cached memories of each token under `ssc` (equation 16).

    Args:
        score: [..., n], of cached memories.
        allowed: bool, broadcasts to [..., n]; True where a memory is already cached.
        top_k: number of memories to select.

    Returns:
        [..., min(top_k, n)] indices in order of descending score; ties go to the earlier segment.
        Unused entries are n, if fewer memories are cached.
    """
    n = score.shape[-1]
    remaining = jnp.where(allowed, jax.lax.stop_gradient(score), -jnp.inf)
    slot = expand_leading_dims(jnp.arange(n, dtype=jnp.int32), remaining.ndim)

    # XLA gathers sharded rows before `lax.top_k`, but not before a maximum.
    def select(remaining: Array, _: None = None) -> tuple[Array, Array]:
        best = jnp.max(remaining, axis=-1, keepdims=True)
        is_best = (remaining == best) & (best > -jnp.inf)
        selected = jnp.min(jnp.where(is_best, slot, n), axis=-1, keepdims=True)
        return jnp.where(slot == selected, -jnp.inf, remaining), selected[..., 0]

    # Unrolled if short, because a loop stores `remaining` between its steps.
    count = min(top_k, n)
    _, selected = jax.lax.scan(select, remaining, None, count, unroll=count <= _MAX_UNROLL)
    return jnp.moveaxis(selected, 0, -1)


def select_memories(score: Array, allowed: Array, config: MCConfig) -> Array:
    """Select `ssc_top_k` of n memories as in `select_top_k`, by scores [..., n]: [..., m].

    Of equal scores, the earlier memory is selected; of buckets, this is the larger one.
    """
    if not config.has_buckets:
        return select_top_k(score, allowed, config.ssc_top_k)
    n = score.shape[-1]
    selected = select_top_k(score[..., ::-1], allowed[..., ::-1], config.ssc_top_k)
    return jnp.where(selected < n, n - 1 - selected, n)


def normalize_scores(score: Array, read_mask: Array, config: MCConfig) -> Array:
    """Convert scores to the weights of a read (equations 7, 10, 17).

    Args:
        score: [..., n + 1].
        read_mask: bool [..., n + 1], True at memories to read, always including the online memory.
        config: the aggregation.
    """
    if not config.gated:
        weight = read_mask.astype(score.dtype)
        if not config.rule.averaged:
            return weight
        return weight / jnp.sum(weight, axis=-1, keepdims=True)
    return jax.nn.softmax(jnp.where(read_mask, score, -jnp.inf), axis=-1)


def readable_mask(segment: Array, n: int, config: MCConfig) -> Array:
    """Return bool [..., n + 1]: the memories that tokens in segments [...] may read."""
    if config.has_buckets:
        bits = expand_leading_dims(jnp.arange(n, dtype=segment.dtype), segment.ndim + 1)
        cached = (segment[..., None] >> bits & 1) == 1
    else:
        cached = segment_ages(segment, n) > 0
    if not config.rule.reads_cache:
        cached = jnp.zeros_like(cached)
    return jnp.concatenate([cached, jnp.ones_like(cached, shape=(*segment.shape, 1))], axis=-1)


def compute_gates(
    u: Array,
    pools: Array,
    running: Array,
    segment: Array,
    config: MCConfig,
    bias: Array | None = None,
) -> Gates:
    """Compute the weights of all tokens' reads.

    Args:
        u: connectors [b, t, h, k].
        pools: cached pooled keys [b, n, h, k].
        running: the online segment's pooled keys [b, t, h, k].
        segment: [t] or [b, t] segment of each token.
        config: the aggregation.
        bias: [h], added to the online memory's scores; None = 0.

    Returns:
        weights [b, t, h, n + 1]; under `ssc` [b, t, h, m + 1] and the memories selected
        [b, t, h, m], m = min(top_k, n).
    """
    if config.rule.sparse:
        return _gate_selected(u, pools, running, expand_leading_dims(segment, 2), config, bias)
    score = jnp.zeros_like(running, shape=(*running.shape[:3], pools.shape[1] + 1))
    if config.gated:
        score = gate_scores(u, pools, running, segment, config, bias)
    return Gates(dense_gates(score, segment, config), None)


def _gate_selected(
    u: Array,
    pools: Array,
    running: Array,
    segment: Array,
    config: MCConfig,
    bias: Array | None,
) -> Gates:
    """Compute the gates under `ssc`; `segment` is [b or 1, t].

    1. Select by the scores of all memories, in blocks and without gradient.
    2. Compute the scores of the selected memories, with gradient.
    3. Normalize them together with the online memory's score, which is last.

    Example: 13 tokens in segments of 4, `ssc_top_k` = 2. Token 5 in segment 1 can select one
    memory: selected = [0, n]. Its weights are those of memory 0, an unused one (0) and the online
    memory.
    """
    n = pools.shape[1]
    u = u.astype(running.dtype).swapaxes(1, 2)  # [b, h, t, k]
    if config.detach_cached_context:
        pools = jax.lax.stop_gradient(pools)
    pools = pools.swapaxes(1, 2)  # [b, h, n, k]

    selected = _select_in_blocks(*jax.lax.stop_gradient((u, pools)), segment, config)  # 1

    if config.gate == "token":  # 2
        age = segment[:, None, :, None] - selected.astype(segment.dtype)
        cached = level_score(u, age).swapaxes(1, 2)
        online = u[..., :1].swapaxes(1, 2)
    else:
        slot = jnp.minimum(selected, n - 1).reshape(*u.shape[:2], -1, 1)
        selected_pools = jnp.take_along_axis(pools, slot, axis=2).reshape(*selected.shape, -1)
        cached = einsum_f32("bhtk,bhtmk->bthm", u, selected_pools, exact=True)
        online = jnp.sum(u.swapaxes(1, 2) * running, axis=-1, keepdims=True)
    online = _add_bias(online, bias)
    score = jnp.concatenate([cached, online], axis=-1) / config.score_divisor

    selected = selected.swapaxes(1, 2)  # 3
    read_mask = jnp.concatenate([selected < n, jnp.ones_like(online, dtype=bool)], axis=-1)
    return Gates(normalize_scores(score, read_mask, config), selected)


def _add_bias(online: Array, bias: Array | None) -> Array:
    """Add biases [h] to scores [b, t, h, 1] of the online memory."""
    if bias is None:
        return online
    return online + expand_leading_dims(bias.astype(online.dtype)[:, None], 4)


def _select_in_blocks(u: Array, pools: Array, segment: Array, config: MCConfig) -> Array:
    """Select memories [b, h, t, m] by connectors [b, h, t, k] and pooled keys [b, h, n, k]."""
    b, h, t, width = u.shape
    segment = jnp.broadcast_to(segment, (b, t))

    def select_block(block: tuple[Array, Array]) -> Array:
        u, segment = block
        if config.gate == "token":
            score = level_score(u, segment_ages(segment, pools.shape[2])[:, None])
        else:
            score = einsum_f32("bhtk,bhnk->bhtn", u, pools, exact=True)
        allowed = readable_mask(segment, pools.shape[2], config)[:, None, :, :-1]
        return select_top_k(score, allowed, config.ssc_top_k)

    size = max(SCORE_BLOCK // 8, min(SCORE_BLOCK, _MAX_SCORES // pools.shape[2]))
    if t <= size:
        return select_block((u, segment))
    # In blocks, because the scores of all tokens would be the largest array of a long sequence.
    blocks = -(-t // size)
    u = jnp.pad(u, [(0, 0), (0, 0), (0, blocks * size - t), (0, 0)])
    segment = jnp.pad(segment, [(0, 0), (0, blocks * size - t)])
    parts = u.reshape(b, h, blocks, size, width), segment.reshape(b, blocks, size)
    selected = jax.lax.map(
        select_block, (jnp.moveaxis(parts[0], 2, 0), jnp.moveaxis(parts[1], 1, 0))
    )
    return jnp.moveaxis(selected, 0, 2).reshape(b, h, blocks * size, -1)[:, :, :t]


def dense_gates(score: Array, segment: Array, config: MCConfig) -> Array:
    """Return the gates of all tokens over all memories, by their definition.

    Args:
        score: [b, t, h, n + 1].
        segment: [t] or [b, t] segment of each token.
        config: the aggregation.

    Returns:
        [b, t, h, n + 1], 0 where a memory is not read.
    """
    n = score.shape[-1] - 1
    read_mask = readable_mask(expand_leading_dims(segment, 2), n, config)[:, :, None]
    if config.rule.sparse:
        selected = select_memories(score[..., :n], read_mask[..., :n], config)
        slots = selected[..., :, None] == expand_leading_dims(
            jnp.arange(n, dtype=selected.dtype), selected.ndim + 1
        )
        online = jnp.ones_like(score[..., n:], dtype=bool)
        read_mask = jnp.concatenate([slots.any(axis=-2), online], axis=-1)
    return normalize_scores(score, jnp.broadcast_to(read_mask, score.shape), config)


def scatter_gates(weights: Array, selected: Array | None, n: int) -> Array:
    """Scatter the weights of selected memories into gates [b, t, h, n + 1] over all memories."""
    if selected is None:
        return weights
    is_selected = selected[..., None] == expand_leading_dims(
        jnp.arange(n, dtype=selected.dtype), selected.ndim + 1
    )
    weight = weights[..., :-1, None]
    cached = jnp.sum(jnp.where(is_selected, weight, jnp.zeros_like(weight)), axis=-2)
    return jnp.concatenate([cached, weights[..., -1:]], axis=-1)
