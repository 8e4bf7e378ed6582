"""Reads of online and cached memories (section 5), in parallel form (section 6)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.backends import Memory, Weights
from mc_jax.backends.base import apply_weights
from mc_jax.buckets import selected_ends
from mc_jax.chunk_layout import from_chunks, from_segments, to_chunks, to_segments
from mc_jax.chunked import OnlineMemory, WriteResult, online_apply
from mc_jax.dense_reads import TileRead, sum_bucket_reads, sum_earlier_reads
from mc_jax.numerics import SAVE_POLICY, Array, einsum_f32, scale_rows
from mc_jax.sparse_reads import ROW_BLOCK, read_selected

# As `sum_earlier_reads` or `sum_bucket_reads`.
SumReads = Callable[[TileRead, Array, Array, Weights], Array]


def read_all(
    memory: Memory,
    config: MCConfig,
    writes: WriteResult,
    q: Array,
    gates: Array,
    selected: Array | None,
    plan: Plan,
) -> Array:
    """Read the online memory and the cached memories of all tokens.

    Args:
        memory: the memory kind.
        config: the aggregation.
        writes: result of the chunked write of the same tokens.
        q: queries [b, t, h, k].
        gates: [b, t, h, n + 1], with the online memory last; under `ssc` [b, t, h, m + 1], for the
            selected memories only.
        selected: indices of the selected memories [b, t, h, m] under `ssc`, else None.
        plan: segments and chunks.

    Returns:
        [b, t, h, v] in the state dtype.
    """
    cached = jax.lax.stop_gradient(writes.ends) if config.detach_cached_states else writes.ends
    if not config.rule.reads_cache or plan.segments == 1:
        return read_online(memory, writes, q, plan) * gates[..., -1:]
    if config.mixes_layers:
        return read_soup(memory, writes, cached, q, gates, plan)
    online = read_online(memory, writes, q, plan) * gates[..., -1:]
    if config.rule.sparse:
        assert selected is not None
        selected = selected_ends(selected, plan) if plan.has_buckets else selected
        return online + read_sparse(memory, cached, q, gates[..., :-1], selected)
    if config.reads_sum:
        return online + read_sum(memory, cached, q, plan) * gates[..., :1]
    return online + read_dense(memory, cached, q, gates, plan)


def read_online(memory: Memory, writes: WriteResult, q: Array, plan: Plan) -> Array:
    """Return the read of the online memory `M_t(q_t)` of each token: [b, t, h, v]."""

    @partial(jax.checkpoint, policy=SAVE_POLICY)
    def read(online: OnlineMemory, q: Array) -> Array:
        return memory.read(online_apply(online, q.dtype), q)

    if writes.online is None:
        assert writes.read is not None
        return from_chunks(writes.read, plan)
    return from_chunks(read(writes.online, to_chunks(q, plan)), plan)


def read_sum(memory: Memory, cached: Weights, q: Array, plan: Plan, *, base: Weights = ()) -> Array:
    """Read the sum of all earlier memories (equation 7). Reads must be linear in the weights.

    Takes cached weights [b, n, h, o, i], q [b, t, h, k], and the sum `base` [b, h, o, i] of the
    memories before the first one, () = 0; returns [b, t, h, v].
    """
    earlier = jax.tree.map(_sums_before, cached)
    if base:
        earlier = tuple(w + x[:, None] for w, x in zip(earlier, base, strict=True))
    queries = to_segments(q, plan).swapaxes(1, 2)  # [b, n, h, c, k]
    read = memory.read(apply_weights(earlier, q.dtype), queries)
    return from_segments(read.swapaxes(1, 2), plan)


def _sums_before(weight: Array) -> Array:
    """Return the sum of all earlier memories for each of [b, n, h, o, i]."""
    # A difference `cumsum(w) - w` would lose precision where a later memory is large.
    sums = jnp.cumsum(weight[:, :-1], axis=1)
    return jnp.concatenate([jnp.zeros_like(weight[:, :1]), sums], axis=1)


def read_dense(
    memory: Memory,
    cached: Weights,
    q: Array,
    gates: Array,
    plan: Plan,
    *,
    sum_reads: SumReads | None = None,
) -> Array:
    """Read every earlier memory or every bucket, weighted by its gate (equations 7 and 9).

    Takes cached weights [b, n, h, o, i], q [b, t, h, k] and gates [b, t, h, slots + 1]; returns
    [b, t, h, v]. `sum_reads` sums the reads; None: those of the memories of the plan.
    """

    def read(x: Array, gate: Array, weights: Weights) -> Array:
        return memory.read_weighted(apply_weights(weights, x.dtype), x, gate)

    x, weight = to_segments(q, plan), to_segments(gates[..., :-1], plan)
    sum_reads = sum_reads or (sum_bucket_reads if plan.has_buckets else sum_earlier_reads)
    return from_segments(sum_reads(read, x, weight, cached), plan)


def read_soup(
    memory: Memory,
    writes: WriteResult,
    cached: Weights,
    q: Array,
    gates: Array,
    plan: Plan,
    *,
    sum_reads: SumReads | None = None,
) -> Array:
    """Read the gate-weighted mixture of all memories (equation 15), mixed layer by layer.

    Takes cached weights [b, n, h, o, i], q [b, t, h, k] and gates [b, t, h, slots + 1]; returns
    [b, t, h, v]. `sum_reads` as in `read_dense`.
    """
    sum_reads = sum_reads or (sum_bucket_reads if plan.has_buckets else sum_earlier_reads)
    weight = to_segments(gates[..., :-1], plan)
    online_gate = to_chunks(gates[..., -1], plan)[..., None]

    def one_layer(a: Array, gate: Array, weights: Weights) -> Array:
        return einsum_f32("...oi,...ci->...co", weights[0], scale_rows(gate, a), dtype=a.dtype)

    online = writes.online
    assert online is not None

    @partial(jax.checkpoint, static_argnums=0)
    def layer_online(layer: int, a: Array, online: OnlineMemory) -> Array:
        return online_gate * online_apply(online, q.dtype)(layer, a)

    def apply(layer: int, a: Array) -> Array:
        a = a.astype(q.dtype)
        tokens = to_segments(from_chunks(a, plan), plan)
        mixed = sum_reads(one_layer, tokens, weight, (cached[layer],))
        return layer_online(layer, a, online) + to_chunks(from_segments(mixed, plan), plan)

    return from_chunks(memory.read(apply, to_chunks(q, plan)), plan)


def read_sparse(
    memory: Memory,
    cached: Weights,
    q: Array,
    weight: Array,
    selected: Array,
    *,
    row_block: int = ROW_BLOCK,
) -> Array:
    """Read the selected memories [b, t, h, m], weighted by their gates (equation 17).

    Rows are read in blocks of at most `row_block`.
    """
    reads = read_selected(memory, cached, q, selected, row_block=row_block)
    return jnp.sum(reads * weight[..., None], axis=-2)


def read_token(
    memory: Memory, config: MCConfig, online: Weights, cached: Weights, q: Array, gates: Array
) -> Array:
    """Compute the read of one token by definition (section 5), from all memories or their mixture.

    Args:
        memory: the memory kind.
        config: the aggregation.
        online: online memory, each [b, h, o, i].
        cached: cached memories, each [b, n, h, o, i].
        q: queries [b, h, k].
        gates: [b, h, n + 1].

    Returns:
        [b, h, v].
    """
    if config.detach_cached_states:
        cached = jax.lax.stop_gradient(cached)
    stacked = jax.tree.map(lambda c, w: jnp.concatenate([c, w[:, None]], axis=1), cached, online)
    weight = gates.swapaxes(1, 2)  # [b, n + 1, h]
    if config.rule.mixes_weights:
        mixed = jax.tree.map(lambda w: jnp.sum(weight[..., None, None] * w, axis=1), stacked)
        return memory.read(apply_weights(mixed, q.dtype), q[..., None, :])[..., 0, :]
    x = jnp.broadcast_to(q[:, None, :, None], (*weight.shape, 1, q.shape[-1]))
    reads = memory.read(apply_weights(stacked, q.dtype), x)[..., 0, :]
    return jnp.sum(weight[..., None] * reads, axis=1)
