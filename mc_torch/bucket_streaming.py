"""Buckets of a stream: those that a call reads and those that it stores (section 7).

The tokens of a call may be in several segments and then read different buckets. These are the
buckets stored before the call, and those that end with the segments that the call completes.
"""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.backends import Memory, Weights
from mc_torch.backends.base import apply_weights
from mc_torch.buckets import compute_bucket_gates, merge_segments, store_buckets, uses_pools
from mc_torch.cache import Cache, Segments, tree_where
from mc_torch.cached_reads import sum_indexed_reads
from mc_torch.chunk_layout import CallLayout, from_call_chunks, to_call_chunks
from mc_torch.gates import Gates
from mc_torch.numerics import Array, einsum_f32, take_along
from mc_torch.offload import read_from_host
from mc_torch.reads import read_sparse


class CallBuckets(NamedTuple):
    """The m buckets that the tokens of a call may read."""

    weights: Weights  # each [b, m, h, o, i]
    pool: Array  # pooled keys [b, m, h, k]
    token_index: Array  # bucket of each exponent, int64 [b, t, n]; m = none
    chunk_index: Array  # the same for the tokens of each chunk, int64 [g, b, n]


def scan_retention(retention: Array, layout: CallLayout, before: Array) -> Array:
    """Return the product of the retention of a segment's tokens after each chunk: [g, b, h].

    Takes retention [b, t, h], 1 at masked tokens, and the product before the call [b, h].
    """
    padding = (layout.chunk_tokens == retention.shape[1]).transpose(0, 1)[:, :, None]
    factors = to_call_chunks(retention, layout)[:, :, 0]  # [g, b, h, c]
    factors = torch.where(padding, 1, factors).prod(dim=-1)
    carry, products = before, []
    for factor, restart in zip(factors.unbind(0), layout.starts_segment[..., 0], strict=True):
        carry = tree_where(restart, torch.ones_like(carry), carry) * factor
        products.append(carry)
    return torch.stack(products)


def complete_buckets(
    memory: Memory,
    config: MCConfig,
    completed: Segments,
    cache: Cache,
    position: Array,
    layout: CallLayout,
) -> tuple[Segments, CallBuckets]:
    """Store the buckets that end with the segments that a call completes.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        completed: the segments that the call may complete [b, s, ...].
        cache: state before the call.
        position: number of processed tokens after the call, int32 [b].
        layout: the call's segments and chunks.

    Returns:
        the stored buckets, and those that the call's tokens read.
    """
    stored, size = cache.stored, config.segment_size
    before, after = cache.position.long() // size, position.long() // size
    ends = merge_segments(memory, config, completed, stored, before)
    t, slots = layout.segment.shape[1], stored.length.shape[1]
    weights, pool = stored.weights, stored.pool
    if t > 1:  # a single token is in the segment after the stored buckets
        weights = tuple(
            torch.cat([read_from_host(_copy, w, x), x], dim=1)
            for w, x in zip(weights, ends.weights, strict=True)
        )
        pool = torch.cat([pool, ends.pool], dim=1)
    exponent = torch.arange(slots, device=before.device)
    prefix = layout.segment[..., None] >> exponent
    end = (prefix << exponent) - before[:, None, None]  # relative to the call; <= 0 if stored
    index = torch.where(end > 0, slots + end - 1, exponent)
    token_index = torch.where(prefix & 1 == 1, index, pool.shape[1])
    first = layout.chunk_tokens[:, :, 0].clamp(max=t - 1)
    chunk_index = take_along(token_index, first[..., None], 1).transpose(0, 1)
    return store_buckets(stored, ends, before, after), CallBuckets(
        weights, pool, token_index, chunk_index
    )


def gate_call(
    u: Array,
    buckets: CallBuckets,
    running: Array,
    layout: CallLayout,
    config: MCConfig,
    bias: Array | None,
) -> Gates:
    """Compute the weights of the reads of a call's tokens; see `compute_bucket_gates`.

    Takes u and running [b, t, h, k] and bias [h] or None.
    """
    slots = buckets.token_index.shape[-1]
    scores = running.new_zeros(*running.shape[:3], slots)
    if uses_pools(config):
        pool = buckets.pool.detach() if config.detach_cached_context else buckets.pool
        row = torch.arange(pool.shape[0], device=pool.device)[:, None]
        pools = pool[row, buckets.chunk_index.clamp(max=pool.shape[1] - 1)]  # [g, b, n, h, k]
        connectors = to_call_chunks(u.to(pool.dtype), layout)
        by_chunk = einsum_f32("gbrhck,gbnhk->gbrhcn", connectors, pools, exact=True)
        scores = from_call_chunks(by_chunk, layout)
    return compute_bucket_gates(u, scores, running, layout.segment, config, bias)


def read_buckets(
    memory: Memory,
    config: MCConfig,
    buckets: CallBuckets,
    q: Array,
    gates: Gates,
    layout: CallLayout,
) -> Array:
    """Read the buckets of a call's tokens, weighted by their gates: [b, t, h, v].

    Takes q [b, t, h, k].
    """
    weight = gates.weights[..., :-1]
    if config.rule.sparse:
        assert gates.selected is not None
        unused = torch.full_like(buckets.token_index[..., :1], buckets.pool.shape[1])
        index = torch.cat([buckets.token_index, unused], dim=-1)[:, :, None]
        index = index.expand(-1, -1, q.shape[2], -1)
        selected = take_along(index, gates.selected, -1)
        return read_sparse(memory, buckets.weights, q, weight, selected)

    def read(x: Array, weights: Weights) -> Array:
        return memory.read(apply_weights(weights, x.dtype), x)

    queries, chunk_gates = to_call_chunks(q, layout), to_call_chunks(weight, layout)
    reads = sum_indexed_reads(read, queries, chunk_gates, buckets.weights, buckets.chunk_index)
    return from_call_chunks(reads, layout)


def mix_buckets(
    buckets: CallBuckets, layer: int, a: Array, gates: Array, layout: CallLayout
) -> Array:
    """Apply the gate-weighted mixture of one layer of the buckets: [g, b, 1, h, c, o].

    Takes the layer's input a [g, b, 1, h, c, i] and gates [b, t, h, n + 1].
    """

    def one_layer(a: Array, weights: Weights) -> Array:
        return einsum_f32("...oi,...ci->...co", weights[0], a, dtype=a.dtype)

    weight = to_call_chunks(gates[..., :-1], layout)
    weights = (buckets.weights[layer],)
    return sum_indexed_reads(one_layer, a, weight, weights, buckets.chunk_index)


def _copy(x: Array, like: Array) -> Array:
    del like  # on the device that reads x
    return x
