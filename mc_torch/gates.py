"""Pooled keys, and gates: the weight of each memory in a token's read (sections 4 and 5)."""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.chunk_layout import TensorPlan, from_segments, to_segments
from mc_torch.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    l2_normalize,
    running_sum,
    state_dtype,
    take_along,
)

SCORE_BLOCK = 512  # number of tokens per block of the top-k selection


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


def pool_keys(k: Array, mask: Array, plan: TensorPlan, config: MCConfig) -> Pools:
    """Pool the unmasked keys of each segment.

    Args:
        k: keys [b, t, h, k], zero at masked tokens.
        mask: [b, t] bool.
        plan: the segments.
        config: pooling and norm.
    """
    dtype = state_dtype(k.dtype)
    sums = running_sum(to_segments(k.to(dtype), plan))  # [b, h, n, c, k]
    token_mask = to_segments(mask[:, :, None, None].to(dtype), plan)
    counts = running_sum(token_mask)[..., 0].to(torch.int32)
    pools = finish_pooling(sums, counts, config)
    return Pools(
        segment=pools[..., -1, :].transpose(1, 2),
        running=from_segments(pools, plan),
        length=counts[:, 0, :, -1],
        total=sums[..., -1, :].transpose(1, 2),
    )


def finish_pooling(total: Array, count: Array, config: MCConfig) -> Array:
    """Return pooled keys from sums of keys [..., k] and counts [...].

    They are the mean (zero if the count is 0) or the sum, with `pool_norm="l2"` of unit norm.
    """
    pools = total
    if config.pooling == "mean":
        pools = total / count.clamp(min=1)[..., None].to(total.dtype)
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
    u = u.to(running.dtype)
    if config.gate == "token":
        age = memory_ages(expand_leading_dims(segment, 2), pools.shape[1], config)[:, :, None]
        cached = level_score(u, age)
    else:
        if config.detach_cached_context:
            pools = pools.detach()
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
        online = torch.sum(u * running, dim=-1, keepdim=True)
    online = _add_bias(online, bias)
    return torch.cat([cached, online], dim=-1) / config.score_divisor


def segment_ages(segment: Array, n: int) -> Array:
    """Return the ages [..., n] of n cached memories relative to segments [...], in segments."""
    return segment[..., None] - expand_leading_dims(
        torch.arange(n, device=segment.device), segment.ndim + 1
    )


def memory_ages(segment: Array, n: int, config: MCConfig) -> Array:
    """Return the ages [..., n] by which `level_score` finds the levels of n cached memories.

    Buckets have fixed levels, so that the age of the bucket of 2^e segments is 2^e.
    """
    if not config.has_buckets:
        return segment_ages(segment, n)
    sizes = 2 ** torch.arange(n, device=segment.device)
    return expand_leading_dims(sizes, segment.ndim + 1).expand(*segment.shape, n)


def level_score(u: Array, age: Array) -> Array:
    """Return the component of u for the level of each cached memory (arXiv:2506.04761).

    The online memory has level 0. A cached memory has level 1 + floor(log2(age)), at most k - 1.

    Args:
        u: connectors [..., k].
        age: integers, broadcasts to [..., m]; the level of an age below 1 is unspecified.

    Returns:
        [..., m].
    """
    # The bit length of an age is the number of powers of two not above it.
    powers = 2 ** torch.arange(31, device=age.device)
    bits = torch.bucketize(age.contiguous(), powers, right=True)
    return take_along(u, bits.clamp(max=u.shape[-1] - 1), -1)


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
    cached = torch.where(allowed, score.detach(), -torch.inf)
    # `torch.topk` does not specify the order of ties.
    best, index = torch.sort(cached, dim=-1, descending=True, stable=True)
    return torch.where(best == -torch.inf, n, index)[..., :top_k]


def select_memories(score: Array, allowed: Array, config: MCConfig) -> Array:
    """Select `ssc_top_k` of n memories as in `select_top_k`, by scores [..., n]: [..., m].

    Of equal scores, the earlier memory is selected; of buckets, this is the larger one.
    """
    if not config.has_buckets:
        return select_top_k(score, allowed, config.ssc_top_k)
    n = score.shape[-1]
    selected = select_top_k(score.flip(-1), allowed.flip(-1), config.ssc_top_k)
    return torch.where(selected < n, n - 1 - selected, n)


def normalize_scores(score: Array, read_mask: Array, config: MCConfig) -> Array:
    """Convert scores to the weights of a read (equations 7, 10, 17).

    Args:
        score: [..., n + 1].
        read_mask: bool [..., n + 1], True at memories to read, always including the online memory.
        config: the aggregation.
    """
    if not config.gated:
        weight = read_mask.to(score.dtype)
        if not config.rule.averaged:
            return weight
        return weight / torch.sum(weight, dim=-1, keepdim=True)
    return torch.softmax(torch.where(read_mask, score, -torch.inf), dim=-1)


def readable_mask(segment: Array, n: int, config: MCConfig) -> Array:
    """Return bool [..., n + 1]: the memories that tokens in segments [...] may read."""
    if config.has_buckets:
        bits = expand_leading_dims(torch.arange(n, device=segment.device), segment.ndim + 1)
        cached = (segment[..., None] >> bits & 1) == 1
    else:
        cached = segment_ages(segment, n) > 0
    if not config.rule.reads_cache:
        cached = torch.zeros_like(cached)
    return torch.cat([cached, torch.ones_like(segment, dtype=torch.bool)[..., None]], dim=-1)


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
    score = running.new_zeros(*running.shape[:3], pools.shape[1] + 1)
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
    u = u.to(running.dtype).transpose(1, 2)  # [b, h, t, k]
    if config.detach_cached_context:
        pools = pools.detach()
    pools = pools.transpose(1, 2)  # [b, h, n, k]

    selected = _select_in_blocks(u.detach(), pools.detach(), segment, config)  # 1

    if config.gate == "token":  # 2
        age = segment[:, None, :, None] - selected
        cached = level_score(u, age).transpose(1, 2)
        online = u[..., :1].transpose(1, 2)
    else:
        slot = selected.clamp(max=n - 1).reshape(*u.shape[:2], -1, 1)
        selected_pools = take_along(pools, slot, 2).reshape(*selected.shape, -1)
        cached = einsum_f32("bhtk,bhtmk->bthm", u, selected_pools, exact=True)
        online = torch.sum(u.transpose(1, 2) * running, dim=-1, keepdim=True)
    online = _add_bias(online, bias)
    score = torch.cat([cached, online], dim=-1) / config.score_divisor

    selected = selected.transpose(1, 2)  # 3
    read_mask = torch.cat([selected < n, torch.ones_like(online, dtype=torch.bool)], dim=-1)
    return Gates(normalize_scores(score, read_mask, config), selected)


def _add_bias(online: Array, bias: Array | None) -> Array:
    """Add biases [h] to scores [b, t, h, 1] of the online memory."""
    if bias is None:
        return online
    return online + expand_leading_dims(bias.to(online.dtype)[:, None], 4)


def _select_in_blocks(u: Array, pools: Array, segment: Array, config: MCConfig) -> Array:
    """Select memories [b, h, t, m] by connectors [b, h, t, k] and pooled keys [b, h, n, k]."""
    b, _, t, _ = u.shape
    segment = segment.expand(b, t)

    def select_block(u: Array, segment: Array) -> Array:
        if config.gate == "token":
            score = level_score(u, segment_ages(segment, pools.shape[2])[:, None])
        else:
            score = einsum_f32("bhtk,bhnk->bhtn", u, pools, exact=True)
        allowed = readable_mask(segment, pools.shape[2], config)[:, None, :, :-1]
        return select_top_k(score, allowed, config.ssc_top_k)

    # In blocks, because the scores of all tokens would be the largest array of a long sequence.
    parts = zip(u.split(SCORE_BLOCK, dim=2), segment.split(SCORE_BLOCK, dim=1), strict=True)
    return torch.cat([select_block(*part) for part in parts], dim=2)


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
        number = torch.arange(n, device=selected.device)
        slots = selected[..., :, None] == expand_leading_dims(number, selected.ndim + 1)
        online = torch.ones_like(score[..., n:], dtype=torch.bool)
        read_mask = torch.cat([slots.any(dim=-2), online], dim=-1)
    return normalize_scores(score, read_mask.expand(score.shape), config)


def scatter_gates(weights: Array, selected: Array | None, n: int) -> Array:
    """Scatter the weights of selected memories into gates [b, t, h, n + 1] over all memories."""
    if selected is None:
        return weights
    is_selected = selected[..., None] == expand_leading_dims(
        torch.arange(n, device=selected.device), selected.ndim + 1
    )
    weight = weights[..., :-1, None]
    cached = torch.sum(torch.where(is_selected, weight, torch.zeros_like(weight)), dim=-2)
    return torch.cat([cached, weights[..., -1:]], dim=-1)
