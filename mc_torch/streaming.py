"""Chunked write and read of the next tokens of a stream, given its cache (sections 4 to 6)."""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.backends import Memory, Tokens, Weights
from mc_torch.backends.base import apply_weights
from mc_torch.bucket_streaming import (
    CallBuckets,
    complete_buckets,
    gate_call,
    mix_buckets,
    read_buckets,
    scan_retention,
)
from mc_torch.cache import Cache, MaybeArray, Segments, start_state, tree_where, write_slots
from mc_torch.cached_reads import CachedRead, sum_cached_reads
from mc_torch.chunk_layout import CallLayout, from_call_chunks, make_call_layout, to_call_chunks
from mc_torch.chunked import (
    Chunks,
    ScanResult,
    WriteResult,
    online_apply,
    online_memory,
    scan_chunks,
)
from mc_torch.gates import Gates, compute_gates, finish_pooling, readable_mask, scatter_gates
from mc_torch.numerics import Array, einsum_f32, running_sum, tree_map, unstack
from mc_torch.reads import read_sparse


class StreamPools(NamedTuple):
    """Pooled keys of the tokens and chunks of a call."""

    running: Array  # [b, t, h, k] of the token's segment, up to and including the token
    sums: Array  # sum of the segment's keys after each chunk [g, b, h, k]
    counts: Array  # number of its unmasked tokens after each chunk, int32 [g, b]
    # Product of its retention after each chunk [g, b, h]; () unless buckets sum states.
    retention: MaybeArray = ()


def extend_chunks(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    count: Array,
    cache: Cache,
    gate_bias: Array | None = None,
) -> tuple[Array, Cache, Array]:
    """Write and read the next tokens of a stream.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        tokens: the next tokens.
        initial: weights W_0 per layer, each [h, o, i].
        count: number of tokens per row, int32 [b]; later tokens are padding.
        cache: state before these tokens.
        gate_bias: biases [h] of the online memory's score, or None.

    Returns:
        output [b, t, h, v], the new cache, and gates [b, t, h, n + 1] over the cache's n slots.
    """
    q, keys = memory.encode_tokens(tokens.q), memory.encode_tokens(tokens.k)
    layout = make_call_layout(cache.position, count, q.shape[1], config)
    encoded = tokens._replace(q=q, k=keys)
    scanned, writes = _write(memory, config, encoded, initial, layout, cache)
    pools = _pool(tokens.k, tokens.mask, layout, cache, config)
    if config.sums_states:
        retention = scan_retention(tokens.coefficients.retention, layout, cache.retention)
        pools = pools._replace(retention=retention)
    position = cache.position + count
    stored, total = cache.stored, cache.total
    totals: Weights = ()
    buckets: CallBuckets | None = None
    if config.has_buckets and config.rule.reads_cache:
        completed = _completed_segments(_after_chunks(scanned), pools, layout, config)
        stored, buckets = complete_buckets(memory, config, completed, cache, position, layout)
    elif not config.has_buckets:
        stored, total, totals = _complete(scanned, pools, layout, cache, config)
    if config.detach_cached_states:
        totals = tree_map(torch.detach, totals)

    if config.reads_sum:
        queries = to_call_chunks(q, layout)
        read = _read_online(memory, writes, queries) + memory.read(
            apply_weights(totals, q.dtype), queries
        )
        read_mask = readable_mask(layout.segment, stored.length.shape[1], config)[:, :, None]
        weight = torch.ones_like(pools.running[..., :1])
        if config.rule.averaged:
            weight = weight / (layout.segment + 1)[..., None, None].to(weight.dtype)
        output = from_call_chunks(read, layout) * weight
        gates = read_mask.to(weight.dtype) * weight
    else:
        if buckets is None:
            call_gates = compute_gates(
                tokens.u, stored.pool, pools.running, layout.segment, config, gate_bias
            )
        else:
            call_gates = gate_call(tokens.u, buckets, pools.running, layout, config, gate_bias)
        cached = buckets or stored.weights
        output = _read(memory, config, writes, cached, q, call_gates, layout)
        gates = scatter_gates(*call_gates, stored.length.shape[1])

    pool_sum, length = pools.sums[-1], pools.counts[-1]
    new = cache._replace(
        stored=stored,
        total=total,
        state=tree_map(lambda x: x[:, 0], scanned.final),
        pool_sum=pool_sum,
        pool=finish_pooling(pool_sum, length[:, None], config),
        length=length,
        slot=cache.slot if config.has_buckets else layout.slot,
        position=position,
        retention=tree_map(lambda x: x[-1], pools.retention),
    )
    return output, new, gates


def _write(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    layout: CallLayout,
    cache: Cache,
) -> tuple[ScanResult, WriteResult]:
    k, v = to_call_chunks(tokens.k, layout), to_call_chunks(tokens.v, layout)
    coefficients = tree_map(lambda x: to_call_chunks(x, layout), tokens.coefficients)
    write_mask = to_call_chunks(tokens.mask[:, :, None].to(coefficients.step.dtype), layout)
    start = start_state(memory, initial, k[0], v[0])
    state = tree_map(lambda x: x[:, None], cache.state)
    restarts = layout.starts_segment if config.state_init_mode == "restart" else None
    # Under `soup`, reads also need the segments that this call completes.
    read_in_scan = config.memory.gradient_uses_weights and not config.mixes_layers
    q = to_call_chunks(tokens.q, layout) if read_in_scan else None
    chunks = Chunks(
        k, v, coefficients, write_mask, q, restarts, layout.has_first_token, layout.completes_chunk
    )
    scanned = scan_chunks(memory, chunks, state, start)
    online = online_memory(memory, scanned, start, restarts)
    return scanned, WriteResult(online, scanned.read, (), scanned.final)


def _pool(k: Array, mask: Array, layout: CallLayout, cache: Cache, config: MCConfig) -> StreamPools:
    keys = to_call_chunks(k.to(cache.pool_sum.dtype), layout)
    sums = running_sum(keys)[:, :, 0]  # [g, b, h, c, k]
    token_mask = to_call_chunks(mask[:, :, None].to(torch.int32), layout)[:, :, 0, 0]
    counts = torch.cumsum(token_mask, dim=-1, dtype=torch.int32)  # [g, b, c]
    carry, before, after = (cache.pool_sum, cache.length), [], []
    ends = unstack((sums[..., -1, :], counts[..., -1], layout.starts_segment[..., 0]))
    for total, count, restart in ends:
        carry = tree_where(restart, tree_map(torch.zeros_like, carry), carry)
        before.append(carry)
        carry = carry[0] + total, carry[1] + count
        after.append(carry)
    before, after = (tree_map(lambda *x: torch.stack(x), *trees) for trees in (before, after))
    sums, counts = before[0][..., None, :] + sums, before[1][..., None] + counts
    running = finish_pooling(sums, counts[:, :, None], config)
    return StreamPools(from_call_chunks(running[:, :, None], layout), *after)


def _complete(
    scanned: ScanResult, pools: StreamPools, layout: CallLayout, cache: Cache, config: MCConfig
) -> tuple[Segments, Weights, Weights]:
    """Store the segments that the call completes.

    Returns:
        the slots, the sum of the weights of all complete segments, and this sum before each chunk
        [g, b, 1, h, o, i]. The sums are () if reads do not use them.
    """
    after = _after_chunks(scanned)
    total, totals = cache.total, ()
    if config.reads_sum:
        completed = tree_where(layout.completes_segment, after, tree_map(torch.zeros_like, after))
        sums = tree_map(lambda x, t: t[None, :, None] + torch.cumsum(x, 0), completed, cache.total)
        total = tree_map(lambda x: x[-1, :, 0], sums)
        totals = tree_map(lambda x, t: torch.cat([t[None, :, None], x[:-1]]), sums, cache.total)
    if not cache.stored.length.shape[1]:
        return cache.stored, total, totals
    completed_segments = _completed_segments(after, pools, layout, config)
    return write_slots(cache.stored, completed_segments, layout.completed_slots), total, totals


def _after_chunks(scanned: ScanResult) -> Weights:
    """Return the memory after each chunk [g, b, 1, h, o, i]."""
    return tuple(
        torch.cat([before[1:], final[None]])
        for before, final in zip(scanned.before, scanned.final.weights, strict=True)
    )


def _completed_segments(
    after: Weights, pools: StreamPools, layout: CallLayout, config: MCConfig
) -> Segments:
    """Return the segments [b, s, ...] that the call may complete, from memories after chunks."""
    chunk = layout.completing_chunk
    row = torch.arange(chunk.shape[0], device=chunk.device)[:, None]
    sums, counts = pools.sums[chunk, row], pools.counts[chunk, row]
    segments = Segments(
        weights=tuple(x[:, :, 0][chunk, row] for x in after),
        pool=finish_pooling(sums, counts[..., None], config),
        length=counts,
    )
    if not config.has_buckets:
        return segments
    retention = tree_map(lambda x: x[chunk, row], pools.retention)
    return segments._replace(pool_sum=sums, retention=retention)


def _read(
    memory: Memory,
    config: MCConfig,
    writes: WriteResult,
    cached: Weights | CallBuckets,
    q: Array,
    gates: Gates,
    layout: CallLayout,
) -> Array:
    """Read the online memory and the cached memories, weighted by gates: [b, t, h, v].

    Takes cached weights [b, n, h, o, i] in slots, or buckets, and q [b, t, h, k].
    """
    if config.detach_cached_states and isinstance(cached, CallBuckets):
        cached = cached._replace(weights=tree_map(torch.detach, cached.weights))
    elif config.detach_cached_states:
        cached = tree_map(torch.detach, cached)
    if config.mixes_layers:
        return _read_soup(memory, writes, cached, q, gates.weights, layout)
    online = from_call_chunks(_read_online(memory, writes, to_call_chunks(q, layout)), layout)
    online = online * gates.weights[..., -1:]
    if not config.rule.reads_cache:
        return online
    if isinstance(cached, CallBuckets):
        return online + read_buckets(memory, config, cached, q, gates, layout)
    if config.rule.sparse:
        assert gates.selected is not None
        return online + read_sparse(memory, cached, q, gates.weights[..., :-1], gates.selected)

    def read(x: Array, weights: Weights) -> Array:
        shape = (*weights[0].shape[:2], *x.shape[2:])
        return memory.read(apply_weights(weights, x.dtype), x.expand(shape))

    return online + _sum_cached(read, q, gates.weights, cached, layout)


def _read_soup(
    memory: Memory,
    writes: WriteResult,
    cached: Weights | CallBuckets,
    q: Array,
    gates: Array,
    layout: CallLayout,
) -> Array:
    """Read the gate-weighted mixture of all memories, layer by layer; gates [b, t, h, n + 1]."""
    assert writes.online is not None
    online_gate = to_call_chunks(gates[..., -1:], layout)
    online = online_apply(writes.online, q.dtype)

    def one_layer(a: Array, weights: Weights) -> Array:
        return einsum_f32("...oi,...ci->...co", weights[0], a, dtype=a.dtype)

    def apply(layer: int, a: Array) -> Array:
        a = a.to(q.dtype)
        if isinstance(cached, CallBuckets):
            mixed = mix_buckets(cached, layer, a, gates, layout)
            return online_gate * online(layer, a) + mixed
        mixed = _sum_cached(one_layer, from_call_chunks(a, layout), gates, (cached[layer],), layout)
        return online_gate * online(layer, a) + to_call_chunks(mixed, layout)

    return from_call_chunks(memory.read(apply, to_call_chunks(q, layout)), layout)


def _sum_cached(
    read: CachedRead, x: Array, gates: Array, weights: Weights, layout: CallLayout
) -> Array:
    """Sum the cached memories' reads of x [b, t, h, i], weighted by gates: [b, t, h, o]."""
    x, weight = x.transpose(1, 2), gates[..., :-1].transpose(1, 2)
    return sum_cached_reads(read, x, weight, weights, layout.segment).transpose(1, 2)


def _read_online(memory: Memory, writes: WriteResult, queries: Array) -> Array:
    """Return the online memory's reads [g, b, 1, h, c, v] of queries in chunks."""
    if writes.online is None:
        assert writes.read is not None
        return writes.read
    return memory.read(online_apply(writes.online, queries.dtype), queries)
