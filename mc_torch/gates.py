"""Pooled keys and gates: how much each memory weighs in a token's read (sections 4 and 5)."""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.layout import TensorPlan, from_segments, to_segments
from mc_torch.numerics import Array, align, product, running_sum, state_dtype, take_along

SCORE_BLOCK = 512  # tokens whose scores stand side by side while memories are selected


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


def pool_keys(k: Array, mask: Array, plan: TensorPlan, pooling: str) -> Pools:
    """Pool the real keys of each segment: their mean (zero if there is none) or their sum.

    Args:
        k: keys [b, t, h, k], zero at masked tokens.
        mask: [b, t] bool.
        plan: the segments.
        pooling: `mean` or `sum`.
    """
    dtype = state_dtype(k.dtype)
    sums = running_sum(to_segments(k.to(dtype), plan))  # [b, h, n, c, k]
    real = to_segments(mask[:, :, None, None].to(dtype), plan)
    counts = running_sum(real)[..., 0].to(torch.int32)
    pools = pooled(sums, counts, pooling)
    return Pools(
        segment=pools[..., -1, :].transpose(1, 2),
        running=from_segments(pools, plan),
        length=counts[:, 0, :, -1],
        total=sums[..., -1, :].transpose(1, 2),
    )


def pooled(total: Array, count: Array, pooling: str) -> Array:
    """Turn sums of keys [..., k] and counts [...] into pooled keys."""
    if pooling == "sum":
        return total
    return total / count.clamp(min=1)[..., None].to(total.dtype)


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
    u = u.to(running.dtype)
    if config.gate == "token":
        age = ages(align(segment, 2), pools.shape[1])[:, :, None]
        cached, online = at_level(u, age), u[..., :1]
    else:
        if config.detach_cached_context:
            pools = pools.detach()
        cached = product("bthk,bnhk->bthn", u, pools, exact=True)
        online = torch.sum(u * running, dim=-1, keepdim=True)
    return torch.cat([cached, online], dim=-1) / config.softmax_temperature


def ages(segment: Array, n: int) -> Array:
    """Return [..., n]: by how many segments the given ones [...] are after each cached memory."""
    return segment[..., None] - align(torch.arange(n, device=segment.device), segment.ndim + 1)


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
    # The bits of an age are as many as the powers of two up to it.
    powers = 2 ** torch.arange(31, device=age.device)
    bits = torch.bucketize(age.contiguous(), powers, right=True)
    return take_along(u, bits.clamp(max=u.shape[-1] - 1), -1)


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
    cached = torch.where(readable, score.detach(), -torch.inf)
    # `torch.topk` leaves the order of ties open.
    best, index = torch.sort(cached, dim=-1, descending=True, stable=True)
    return torch.where(best == -torch.inf, n, index)[..., :top_k]


def weigh(score: Array, read: Array, config: MCConfig) -> Array:
    """Turn scores into the weights of a read (equations 7, 10, 17).

    Args:
        score: [..., n + 1].
        read: bool [..., n + 1], True where a memory is read; the online memory always is.
        config: the aggregation.
    """
    if not config.gated:
        weight = read.to(score.dtype)
        if not config.rule.averaged:
            return weight
        return weight / torch.sum(weight, dim=-1, keepdim=True)
    return torch.softmax(torch.where(read, score, -torch.inf), dim=-1)


def readable(segment: Array, n: int, config: MCConfig) -> Array:
    """Return bool [..., n + 1]: the memories that tokens of the given segments [...] may read."""
    cached = ages(segment, n) > 0
    if not config.rule.reads_cache:
        cached = torch.zeros_like(cached)
    return torch.cat([cached, torch.ones_like(segment, dtype=torch.bool)[..., None]], dim=-1)


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
    score = running.new_zeros(*running.shape[:3], pools.shape[1] + 1)
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
    u = u.to(running.dtype).transpose(1, 2)  # [b, h, t, k]
    if config.detach_cached_context:
        pools = pools.detach()
    pools = pools.transpose(1, 2)  # [b, h, n, k]

    selected = _select_in_blocks(u.detach(), pools.detach(), segment, config)  # 1

    if config.gate == "token":  # 2
        age = segment[:, None, :, None] - selected
        cached = at_level(u, age).transpose(1, 2)
        online = u[..., :1].transpose(1, 2)
    else:
        slot = selected.clamp(max=n - 1).reshape(*u.shape[:2], -1, 1)
        picked = take_along(pools, slot, 2).reshape(*selected.shape, -1)
        cached = product("bhtk,bhtmk->bthm", u, picked, exact=True)
        online = torch.sum(u.transpose(1, 2) * running, dim=-1, keepdim=True)
    score = torch.cat([cached, online], dim=-1) / config.softmax_temperature

    selected = selected.transpose(1, 2)  # 3
    read = torch.cat([selected < n, torch.ones_like(online, dtype=torch.bool)], dim=-1)
    return Gates(weigh(score, read, config), selected)


def _select_in_blocks(u: Array, pools: Array, segment: Array, config: MCConfig) -> Array:
    """Return what tokens [b, h, t, k] select among pools [b, h, n, k]: [b, h, t, min(top_k, n)]."""
    b, _, t, _ = u.shape
    segment = segment.expand(b, t)

    def one(u: Array, segment: Array) -> Array:
        if config.gate == "token":
            score = at_level(u, ages(segment, pools.shape[2])[:, None])
        else:
            score = product("bhtk,bhnk->bhtn", u, pools, exact=True)
        allowed = readable(segment, pools.shape[2], config)[:, None, :, :-1]
        return select(score, allowed, config.ssc_top_k)

    # The scores of all tokens at once would be the largest array of a long sequence.
    parts = zip(u.split(SCORE_BLOCK, dim=2), segment.split(SCORE_BLOCK, dim=1), strict=True)
    return torch.cat([one(*part) for part in parts], dim=2)


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
        number = torch.arange(n, device=selected.device)
        slots = selected[..., :, None] == align(number, selected.ndim + 1)
        online = torch.ones_like(score[..., n:], dtype=torch.bool)
        read = torch.cat([slots.any(dim=-2), online], dim=-1)
    return weigh(score, read.expand(score.shape), config)


def spread(weights: Array, selected: Array | None, n: int) -> Array:
    """Turn what `gate` returns into gates [b, t, h, n + 1] over all memories."""
    if selected is None:
        return weights
    at = selected[..., None] == align(torch.arange(n, device=selected.device), selected.ndim + 1)
    share = weights[..., :-1, None]
    cached = torch.sum(torch.where(at, share, torch.zeros_like(share)), dim=-2)
    return torch.cat([cached, weights[..., -1:]], dim=-1)
