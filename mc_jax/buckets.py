"""Buckets of segments: the cached memories under `segmentation="fenwick"` (section 7).

A token after s complete segments reads one bucket for each set bit of s. All tokens that read the
bucket ending with segment i read the same one: it has 2^e segments, with e the number of trailing
zeros of i + 1, as in a Fenwick tree. Hence n segments have n buckets, one per last segment, and a
stream stores one bucket per exponent.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.cache_checks import NO_SLOT
from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.backends import Memory
from mc_jax.cache import Segments, tree_where, write_slots
from mc_jax.chunk_layout import from_segments, to_segments
from mc_jax.gates import (
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
from mc_jax.numerics import Array, einsum_f32, expand_leading_dims, state_dtype
from mc_jax.offload import read_from_host


def segment_retention(retention: Array, plan: Plan) -> Array:
    """Return the product of the retention of each segment's tokens: [b, n, h].

    Takes retention [b, t, h], 1 at masked tokens.
    """
    padding = jnp.asarray(plan.segment_tokens == plan.tokens)[None, None]
    by_segment = to_segments(retention, plan)  # [b, h, n, c]
    factors = jnp.where(padding, jnp.ones_like(by_segment), by_segment)
    return jnp.prod(factors, axis=-1).swapaxes(1, 2)


def empty_buckets(segments: Segments, slots: int) -> Segments:
    """Return buckets [b, slots, ...] of a stream without tokens, like `segments` [b, n, ...]."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, shape=(x.shape[0], slots, *x.shape[2:])), segments
    )


def merge(memory: Memory, config: MCConfig, left: Segments, right: Segments) -> Segments:
    """Merge adjacent buckets, with any leading axes [...], into one.

    If states are summed, those of the left bucket are decayed by the tokens of the right one.
    Otherwise, the memory is that after the last token.
    """
    weights, retention = right.weights, right.retention
    if config.sums_states:
        dtype = state_dtype(right.pool.dtype)
        earlier = memory.retain(tuple(w.astype(dtype) for w in left.weights), right.retention)
        weights = tuple(
            (w + x.astype(dtype)).astype(x.dtype) for w, x in zip(earlier, weights, strict=True)
        )
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
    end = complete[:, None] + _range(s, 2) + 1
    weights = tuple(
        w.astype(x.dtype) for w, x in zip(segments.weights, stored.weights, strict=True)
    )
    # Only sums of states need earlier weights.
    buckets = segments._replace(weights=weights if config.sums_states else ())
    stored = stored if config.sums_states else stored._replace(weights=())
    for exponent in range(slots - 1):
        earlier = partial(_earlier_buckets, exponent=exponent)
        merged = merge(memory, config, jax.tree.map(earlier, buckets, stored), buckets)
        is_end = jnp.broadcast_to(end % 2 ** (exponent + 1) == 0, buckets.length.shape)
        buckets = tree_where(is_end, merged, buckets)
    return buckets if config.sums_states else buckets._replace(weights=weights)


def carry_segment(
    memory: Memory, config: MCConfig, segment: Segments, stored: Segments, complete: Array
) -> Segments:
    """Add a complete segment [b, ...] to the buckets [b, n, ...] of `complete` segments.

    This is a binary addition: while the next slot is occupied, its bucket is merged and removed.
    """
    slots, carried, carries = [], segment, jnp.ones_like(complete, dtype=bool)
    for exponent in range(stored.length.shape[1]):
        slot = jax.tree.map(lambda x, e=exponent: x[:, e], stored)
        occupied = (complete >> exponent & 1) == 1
        merged = merge(memory, config, slot, carried)
        placed = jax.tree.map(lambda new, old: new.astype(old.dtype), carried, slot)
        empty = jax.tree.map(jnp.zeros_like, slot)
        slots.append(tree_where(carries, tree_where(occupied, empty, placed), slot))
        carries = carries & occupied
        carried = tree_where(carries, merged, carried)
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *slots)


def store_buckets(stored: Segments, buckets: Segments, before: Array, after: Array) -> Segments:
    """Return the stored buckets [b, n, ...] after a call that completes segments.

    Args:
        stored: the buckets before the call [b, n, ...].
        buckets: the bucket that ends with each of the call's segments [b, s, ...].
        before: number of complete segments before the call [b].
        after: number of complete segments after the call [b].
    """
    exponent = _range(stored.length.shape[1], 2)
    prefix = after[:, None] >> exponent
    changed = prefix != before[:, None] >> exponent
    end = (prefix << exponent) - 1 - before[:, None]
    new = gather_buckets(buckets, jnp.where(prefix & 1 == 1, end, buckets.length.shape[1]))
    return write_slots(stored, new, jnp.where(changed, exponent, NO_SLOT))


def gather_buckets(buckets: Segments, index: Array) -> Segments:
    """Gather buckets [b, m, ...] from [b, s, ...] at indices [b or 1, m]; zeros where it is s."""
    b, s = buckets.length.shape
    index = jnp.broadcast_to(index, (b, index.shape[1]))
    row = jnp.arange(b, dtype=index.dtype)[:, None]
    gathered = jax.tree.map(lambda x: x[row, jnp.clip(index, 0, s - 1)], buckets)
    return tree_where(index < s, gathered, jax.tree.map(jnp.zeros_like, gathered))


def bucket_scores(u: Array, pool: Array, plan: Plan, config: MCConfig) -> Array:
    """Return the scores `<u_t, m>` [b, t, h, slots] of the buckets that each token reads.

    They are 0 if the gates do not use them, and unspecified where there is no bucket.

    Args:
        u: connectors [b, t, h, k].
        pool: pooled key of the bucket that ends with each segment [b, n, h, k].
        plan: the segments.
        config: the layer's configuration.
    """
    if not uses_pools(config):
        return jnp.zeros_like(pool, shape=(*u.shape[:3], plan.slots))
    pool = jax.lax.stop_gradient(pool) if config.detach_cached_context else pool
    pools = pool[:, plan.bucket_ends.clip(max=plan.segments - 1)]  # [b, n, e, h, k]
    connectors = to_segments(u.astype(pool.dtype), plan)
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
    n, u, segment = cached.shape[-1], u.astype(running.dtype), expand_leading_dims(segment, 2)
    score = jnp.concatenate([cached, jnp.zeros_like(running[..., :1])], axis=-1)
    if config.gated and not uses_pools(config):
        cached = level_score(u, memory_ages(segment, n, config)[:, :, None])
    if config.gated:
        score = append_online_score(cached, u, running, config, bias)
    if not config.rule.sparse:
        return Gates(dense_gates(score, segment, config), None)
    allowed = readable_mask(segment, n, config)[:, :, None, :-1]
    selected = select_memories(score[..., :-1], allowed, config)
    chosen = jnp.take_along_axis(score, jnp.minimum(selected, n - 1), axis=-1)
    chosen = jnp.concatenate([chosen, score[..., -1:]], axis=-1)
    online = jnp.ones_like(selected[..., :1], dtype=bool)
    is_read = jnp.concatenate([selected < n, online], axis=-1)
    return Gates(normalize_scores(chosen, is_read, config), selected)


def selected_ends(selected: Array, plan: Plan) -> Array:
    """Return the last segments [b, t, h, m] of the buckets selected [b, t, h, m]; n = unused."""
    unused = np.full_like(plan.bucket_ends[:, :1], plan.segments)
    ends = np.concatenate([plan.bucket_ends, unused], axis=1)[plan.segment_of]
    table = jnp.asarray(ends, selected.dtype)[None, :, None]
    shape = (*selected.shape[:3], table.shape[-1])
    return jnp.take_along_axis(jnp.broadcast_to(table, shape), selected, axis=-1)


def _earlier_buckets(x: Array, stored: Array, exponent: int) -> Array:
    """Return the bucket [b, s, ...] that is 2^exponent places before each bucket [b, s, ...].

    Before the first one, it is the stored bucket [b, n, ...] of this exponent.
    """
    s, distance = x.shape[1], min(2**exponent, x.shape[1])
    slot = read_from_host(lambda x: x[:, exponent : exponent + 1], stored)
    first = jnp.broadcast_to(slot, (slot.shape[0], distance, *slot.shape[2:]))
    return jnp.concatenate([first, x[:, : s - distance]], axis=1)


def _range(count: int, ndim: int) -> Array:
    return expand_leading_dims(jnp.arange(count, dtype=jnp.int32), ndim)
