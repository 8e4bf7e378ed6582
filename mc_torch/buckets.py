"""Buckets of segments: the cached memories under `segmentation="fenwick"` (section 7).

A token after s complete segments reads one bucket for each set bit of s. All tokens that read the
bucket ending with segment i read the same one: it has 2^e segments, with e the number of trailing
zeros of i + 1, as in a Fenwick tree. Hence n segments have n buckets, one per last segment, and a
stream stores one bucket per exponent.
"""

from functools import partial

import torch

from mc_core.cache_checks import NO_SLOT
from mc_core.config import MCConfig
from mc_torch.backends import Memory
from mc_torch.cache import Segments, is_traced, tree_where, write_slots
from mc_torch.chunk_layout import TensorPlan, from_segments, to_segments
from mc_torch.gates import (
    Gates,
    append_online_score,
    dense_gates,
    finish_pooling,
    level_score,
    memory_ages,
    normalize_scores,
    readable_mask,
    select_memories,
)
from mc_torch.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    state_dtype,
    take_along,
    tree_map,
    unstack,
)
from mc_torch.offload import read_from_host


def segment_retention(retention: Array, plan: TensorPlan) -> Array:
    """Return the product of the retention of each segment's tokens: [b, n, h].

    Takes retention [b, t, h], 1 at masked tokens.
    """
    padding = plan.segment_tokens.positions.reshape(plan.segments, -1) == plan.tokens
    by_segment = to_segments(retention, plan)  # [b, h, n, c]
    return torch.where(padding, 1, by_segment).prod(dim=-1).transpose(1, 2)


def empty_buckets(segments: Segments, slots: int) -> Segments:
    """Return buckets [b, slots, ...] of a stream without tokens, like `segments` [b, n, ...]."""
    return tree_map(lambda x: x.new_zeros(x.shape[0], slots, *x.shape[2:]), segments)


def merge(memory: Memory, config: MCConfig, left: Segments, right: Segments) -> Segments:
    """Merge adjacent buckets, with any leading axes [...], into one.

    If states are summed, those of the left bucket are decayed by the tokens of the right one.
    Otherwise, the memory is that after the last token.
    """
    weights, retention = right.weights, right.retention
    if config.sums_states:
        dtype = state_dtype(right.pool.dtype)
        earlier = memory.retain(tree_map(lambda w: w.to(dtype), left.weights), right.retention)
        weights = tuple((w + x).to(x.dtype) for w, x in zip(earlier, weights, strict=True))
        retention = left.retention * right.retention
    pool_sum, length = left.pool_sum + right.pool_sum, left.length + right.length
    pool = finish_pooling(pool_sum, length[..., None], config)
    return Segments(weights, pool, length, pool_sum, retention)


def merge_segments(
    memory: Memory, config: MCConfig, segments: Segments, stored: Segments, complete: Array
) -> Segments:
    """Return the bucket that ends with each segment, by one merge per level of the tree.

    Level e merges the buckets of 2^e segments whose end is a multiple of 2^(e + 1) with the 2^e
    segments before them. Example: 2 segments were complete, and segments 2 to 5 follow. Level 0
    merges 3 with 2 and 5 with 4; level 1 merges 2-3 with the stored bucket 0-1. The buckets that
    end with segments 2 to 5 have segments 2, 0-3, 4 and 4-5.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        segments: s consecutive segments [b, s, ...].
        stored: the buckets before them [b, n, ...].
        complete: number of segments before them [b or 1].

    Returns:
        [b, s, ...], with weights in the dtype of the stored ones.
    """
    s, slots = segments.length.shape[1], stored.length.shape[1]
    end = complete[:, None] + torch.arange(1, s + 1, device=complete.device)
    weights = tuple(w.to(x.dtype) for w, x in zip(segments.weights, stored.weights, strict=True))
    # Only sums of states need earlier weights.
    buckets = segments._replace(weights=weights if config.sums_states else ())
    stored = stored if config.sums_states else stored._replace(weights=())
    for exponent in range(slots - 1):
        earlier = partial(_earlier_buckets, exponent=exponent)
        merged = merge(memory, config, tree_map(earlier, buckets, stored), buckets)
        buckets = tree_where(end % 2 ** (exponent + 1) == 0, merged, buckets)
    return buckets if config.sums_states else buckets._replace(weights=weights)


def carry_segment(
    memory: Memory, config: MCConfig, segment: Segments, stored: Segments, complete: int
) -> Segments:
    """Add a complete segment [b, ...] to the buckets [b, n, ...] of `complete` segments.

    This is a binary addition: while the next slot is occupied, its bucket is merged and removed.
    """
    slots, carried = unstack(stored, dim=1), segment
    for exponent, slot in enumerate(slots):
        if not complete >> exponent & 1:
            slots[exponent] = tree_map(lambda new, old: new.to(old.dtype), carried, slot)
            break
        carried = merge(memory, config, slot, carried)
        slots[exponent] = tree_map(torch.zeros_like, slot)
    return tree_map(lambda *x: torch.stack(x, dim=1), *slots)


def store_buckets(stored: Segments, buckets: Segments, before: Array, after: Array) -> Segments:
    """Return the stored buckets [b, n, ...] after a call that completes segments.

    Args:
        stored: the buckets before the call [b, n, ...].
        buckets: the bucket that ends with each of the call's segments [b, s, ...].
        before: number of complete segments before the call [b].
        after: number of complete segments after the call [b].
    """
    exponent = torch.arange(stored.length.shape[1], device=before.device)
    prefix = after[:, None] >> exponent
    changed = prefix != before[:, None] >> exponent
    if not is_traced(changed) and not changed.any():
        return stored
    end = (prefix << exponent) - 1 - before[:, None]
    new = gather_buckets(buckets, torch.where(prefix & 1 == 1, end, buckets.length.shape[1]))
    return write_slots(stored, new, torch.where(changed, exponent, NO_SLOT))


def gather_buckets(buckets: Segments, index: Array) -> Segments:
    """Gather buckets [b, m, ...] from [b, s, ...] at indices [b or 1, m]; zeros where it is s."""
    b, s = buckets.length.shape
    row = torch.arange(b, device=index.device)[:, None]
    found = (index < s).expand(b, -1)
    gathered = tree_map(lambda x: x[row, index.clamp(0, s - 1)], buckets)
    return tree_where(found, gathered, tree_map(torch.zeros_like, gathered))


def bucket_scores(u: Array, pool: Array, plan: TensorPlan, config: MCConfig) -> Array:
    """Return the scores `<u_t, m>` [b, t, h, slots] of the buckets that each token reads.

    They are 0 if the gates do not use them, and unspecified where there is no bucket.

    Args:
        u: connectors [b, t, h, k].
        pool: pooled key of the bucket that ends with each segment [b, n, h, k].
        plan: the segments.
        config: the layer's configuration.
    """
    if not uses_pools(config):
        return pool.new_zeros(*u.shape[:3], plan.slots)
    pool = pool.detach() if config.detach_cached_context else pool
    pools = pool[:, plan.bucket_ends.clamp(max=plan.segments - 1)]  # [b, n, e, h, k]
    connectors = to_segments(u.to(pool.dtype), plan)
    scores = einsum_f32("bhnck,bnehk->bhnce", connectors, pools, exact=True)
    return from_segments(scores, plan)


def uses_pools(config: MCConfig) -> bool:
    """Return True if gates depend on pooled keys."""
    return config.gated and config.gate == "context"


def compute_bucket_gates(
    u: Array,
    cached: Array,
    running: Array,
    segment: Array,
    config: MCConfig,
    bias: Array | None = None,
) -> Gates:
    """Compute the weights of all tokens' reads, with buckets in the place of segments.

    Args:
        u: connectors [b, t, h, k].
        cached: scores of the buckets [b, t, h, n].
        running: the online segment's pooled keys [b, t, h, k].
        segment: [t] or [b, t] segment of each token.
        config: the aggregation.
        bias: [h], added to the online memory's scores; None = 0.

    Returns:
        as `compute_gates`.
    """
    n, u, segment = cached.shape[-1], u.to(running.dtype), expand_leading_dims(segment, 2)
    score = torch.cat([cached, torch.zeros_like(running[..., :1])], dim=-1)
    if config.gated and not uses_pools(config):
        cached = level_score(u, memory_ages(segment, n, config)[:, :, None])
    if config.gated:
        score = append_online_score(cached, u, running, config, bias)
    if not config.rule.sparse:
        return Gates(dense_gates(score, segment, config), None)
    allowed = readable_mask(segment, n, config)[:, :, None, :-1]
    selected = select_memories(score[..., :-1], allowed, config)
    chosen = take_along(score, selected.clamp(max=n - 1), -1)
    chosen = torch.cat([chosen, score[..., -1:]], dim=-1)
    is_read = torch.cat([selected < n, torch.ones_like(selected[..., :1]) == 1], dim=-1)
    return Gates(normalize_scores(chosen, is_read, config), selected)


def selected_ends(selected: Array, plan: TensorPlan) -> Array:
    """Return the last segments [b, t, h, m] of the buckets selected [b, t, h, m]; n = unused."""
    unused = torch.full_like(plan.bucket_ends[:, :1], plan.segments)
    ends = torch.cat([plan.bucket_ends, unused], dim=1)
    segment = torch.tensor(plan.segment_of, device=selected.device)[:, None, None]
    return ends[segment, selected]


def _earlier_buckets(x: Array, stored: Array, exponent: int) -> Array:
    """Return the bucket [b, s, ...] that is 2^exponent places before each bucket [b, s, ...].

    Before the first one, it is the stored bucket [b, n, ...] of this exponent.
    """
    s, distance = x.shape[1], min(2**exponent, x.shape[1])
    index = torch.tensor([exponent], device=x.device)
    slot = read_from_host(lambda x, index: x.index_select(1, index), stored, index)
    first = slot.expand(-1, distance, *slot.shape[2:])
    return torch.cat([first, x[:, : s - distance]], dim=1)
