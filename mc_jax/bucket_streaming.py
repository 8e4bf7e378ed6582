"""Buckets of a stream: those that a call reads and those that it stores (section 7).

The tokens of a call may be in several segments and then read different buckets. These are the
buckets stored before the call, and those that end with the segments that the call completes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_jax.backends import Memory, Weights
from mc_jax.backends.base import apply_weights
from mc_jax.buckets import compute_bucket_gates, merge_segments, store_buckets, uses_pools
from mc_jax.cache import Cache, Segments, tree_where
from mc_jax.cached_reads import sum_indexed_reads
from mc_jax.chunk_layout import CallLayout, from_call_chunks, to_call_chunks
from mc_jax.gates import Gates
from mc_jax.numerics import Array, einsum_f32, expand_leading_dims
from mc_jax.offload import read_from_host
from mc_jax.reads import read_sparse


class CallBuckets(NamedTuple):
    """The m buckets that the tokens of a call may read."""

    weights: Weights  # each [b, m, h, o, i]
    pool: Array  # pooled keys [b, m, h, k]
    token_index: Array  # bucket of each exponent, int32 [b, t, n]; m = none
    chunk_index: Array  # the same for the tokens of each chunk, int32 [g, b, n]


def scan_retention(retention: Array, layout: CallLayout, before: Array) -> Array:
    """Return the product of the retention of a segment's tokens after each chunk: [g, b, h].

    Takes retention [b, t, h], 1 at masked tokens, and the product before the call [b, h].
    """
    padding = (layout.chunk_tokens == retention.shape[1]).swapaxes(0, 1)[:, :, None]
    factors = to_call_chunks(retention, layout)[:, :, 0]  # [g, b, h, c]
    factors = jnp.prod(jnp.where(padding, jnp.ones_like(factors), factors), axis=-1)

    def step(carry: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        factor, restart = chunk
        carry = tree_where(restart, jnp.ones_like(carry), carry) * factor
        return carry, carry

    return jax.lax.scan(step, before, (factors, layout.starts_segment[..., 0]))[1]


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
    before, after = cache.position // size, position // size
    ends = merge_segments(memory, config, completed, stored, before)
    t, slots = layout.segment.shape[1], stored.length.shape[1]
    weights, pool = stored.weights, stored.pool
    if t > 1:  # a single token is in the segment after the stored buckets
        weights = tuple(
            jnp.concatenate([read_from_host(lambda w: w, w), x], axis=1)
            for w, x in zip(weights, ends.weights, strict=True)
        )
        pool = jnp.concatenate([pool, ends.pool], axis=1)
    exponent = expand_leading_dims(jnp.arange(slots, dtype=jnp.int32), 3)
    prefix = layout.segment[..., None] >> exponent
    end = (prefix << exponent) - before[:, None, None]  # relative to the call; <= 0 if stored
    index = jnp.where(end > 0, slots + end - 1, exponent)
    token_index = jnp.where(prefix & 1 == 1, index, pool.shape[1])
    first = jnp.minimum(layout.chunk_tokens[:, :, 0], t - 1)
    chunk_index = jnp.take_along_axis(token_index, first[..., None], axis=1).swapaxes(0, 1)
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
    scores = jnp.zeros_like(running, shape=(*running.shape[:3], slots))
    if uses_pools(config):
        pool = buckets.pool
        pool = jax.lax.stop_gradient(pool) if config.detach_cached_context else pool
        row = jnp.arange(pool.shape[0], dtype=jnp.int32)[None, :, None]
        pools = pool[row, jnp.minimum(buckets.chunk_index, pool.shape[1] - 1)]  # [g, b, n, h, k]
        connectors = to_call_chunks(u.astype(pool.dtype), layout)
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
        unused = jnp.full_like(buckets.token_index[..., :1], buckets.pool.shape[1])
        index = jnp.concatenate([buckets.token_index, unused], axis=-1)[:, :, None]
        index = jnp.broadcast_to(index, (*q.shape[:3], index.shape[-1]))
        selected = jnp.take_along_axis(index, gates.selected, axis=-1)
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
