"""Memory Caching without parameters: write, cache, gate, read."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.argument_checks import check_arguments, check_method
from mc_core.cache_checks import NO_SLOT
from mc_core.config import MCConfig
from mc_core.segmentation import Plan, check_streaming_config, make_plan
from mc_jax.backends import (
    Coefficients,
    Memory,
    MemoryState,
    Norm,
    Tokens,
    Weights,
    make_memory,
)
from mc_jax.buckets import (
    bucket_scores,
    compute_bucket_gates,
    empty_buckets,
    gather_buckets,
    merge_segments,
    segment_retention,
)
from mc_jax.cache import Cache, MaybeArray, Segments, cast_cache, nan_past_capacity, sum_complete
from mc_jax.cache_rows import add_row, drop_rows, map_rows
from mc_jax.chunk_layout import first_tokens
from mc_jax.chunked import write_chunks
from mc_jax.context import TokenSplit, active_split
from mc_jax.context_memory import BlockResult, check_split, run_blocks
from mc_jax.gates import compute_gates, pool_keys, scatter_gates
from mc_jax.inspection import InnerLoop, measure_writes
from mc_jax.numerics import Array, is_static, state_dtype
from mc_jax.reads import read_all
from mc_jax.recurrent import run_tokens
from mc_jax.streaming import extend_chunks


class Result(NamedTuple):
    """Result of `memory_caching`."""

    output: Array  # [b, t, h, v], in the dtype of v
    cache: Cache  # state after the last token
    # [b, t, h, n + 1]: cached memories (segments, or index i for the bucket of 2^i segments), then
    # the online memory; 0 if not read.
    gates: Array
    inner: InnerLoop | None = None  # statistics of the writes, if inspected


def memory_caching(
    q: Array,
    k: Array,
    v: Array,
    u: Array | None,
    initial: Weights,
    coefficients: Coefficients,
    config: MCConfig,
    *,
    mask: Array | None = None,
    segment_lengths: Sequence[int] | None = None,
    norm: Norm = None,
    gate_bias: Array | None = None,
    method: str = "chunked",
    inspect: bool = False,
    split: TokenSplit | None = None,
) -> Result:
    """Write a sequence to a memory, cache the memory after each segment, and read all memories.

    Implements arXiv:2602.24281. Projections, convolutions and norms of q, k and the output are part
    of the layer; the feature map is part of the memory.

    Args:
        q: queries [b, t, h, k].
        k: keys [b, t, h, k].
        v: values [b, t, h, v].
        u: connectors [b, t, h, k]; None if the aggregation has no gates, or with `use_q_as_u`.
        initial: weights W_0 per layer, each [h, out, in]; a matrix memory has one, [h, v, k].
        coefficients: step, retention, momentum, previous, each [b, t, h] or None.
        config: the layer's configuration.
        mask: [b, t] bool, False at masked tokens, which are not written and have output 0.
        segment_lengths: explicit segment lengths with sum t. The cache can be extended only if they
            equal the lengths of the configuration. None under `fenwick`.
        norm: (gain, bias), each [h, v], for a memory with `norm="layer"`.
        gate_bias: [h], added to the online memory's score before the division by the temperature;
            unused if the aggregation has no gates.
        method: `chunked`, the parallel form, or `recurrent`, the token-by-token definition. Both
            give the same result.
        inspect: also return `inner`; only for `chunked`.
        split: split of the tokens over the mesh axis `context`, in whose order they are. None: with
            such an axis, blocks in the order of the sequence. `recurrent` and `inspect` ignore it.

    Raises:
        ValueError: an argument is missing, has a wrong shape, or is an unknown name.
    """
    check_method(method, inspect)
    tensors = {"q": q, "k": k, "v": v, "u": u}
    check_arguments(
        tensors, initial, coefficients, config, norm, mask, is_static, gate_bias=gate_bias
    )
    b, t = q.shape[:2]
    plan = make_plan(t, config, segment_lengths)
    mask = jnp.ones((b, t), bool) if mask is None else mask
    if not b:
        # Reshapes and matrix products may fail for an empty batch: add a row, drop it at the end.
        arguments = q, k, v, u, coefficients, mask
        q, k, v, u, coefficients, mask = jax.tree.map(add_row, arguments)
    tokens = _zero_masked(q, k, v, u, coefficients, mask)
    memory = make_memory(config.memory, norm, initial)
    inner, split = None, active_split(split)
    if method == "recurrent":
        output, cache, gates = run_tokens(memory, config, tokens, initial, plan, gate_bias)
    elif split and not inspect:
        check_split(config, t, split, segment_lengths)
        found = run_blocks(tokens, initial, norm, gate_bias, config=config, split=split)
        output, gates = found.output, found.gates
        cache = _cache_of_blocks(memory, config, found, split, plan)
    else:
        output, cache, gates, inner = _run_chunks(
            memory, config, tokens, initial, plan, gate_bias, inspect=inspect
        )
    head_mask = mask[:, :, None, None]
    output = jnp.where(head_mask, output, jnp.zeros_like(output)).astype(v.dtype)
    gates = jnp.where(head_mask, gates, jnp.zeros_like(gates))
    result = Result(output, cache, gates, inner)
    return result if b else _drop_rows(result)


@partial(jax.jit, static_argnames="config")
def extend(
    q: Array,
    k: Array,
    v: Array,
    u: Array | None,
    initial: Weights,
    coefficients: Coefficients,
    cache: Cache,
    *,
    config: MCConfig,
    mask: Array | None = None,
    count: Array | None = None,
    norm: Norm = None,
    gate_bias: Array | None = None,
) -> Result:
    """Process the next tokens of a stream.

    Any split of a sequence into calls gives the result of `memory_caching` on the whole sequence.
    A compiled program cannot raise: rows that exceed the capacity of the cache have output NaN.
    Call `check_capacity` first to raise an error instead.

    Args:
        q: as in `memory_caching`.
        k: as in `memory_caching`.
        v: as in `memory_caching`.
        u: as in `memory_caching`.
        initial: as in `memory_caching`.
        coefficients: as in `memory_caching`.
        cache: state of the stream before these tokens.
        config: the layer's configuration, with `constant` or `fenwick` segments.
        mask: as in `memory_caching`.
        count: number of tokens per row, int32 [b]; later tokens are padding, which does not advance
            the position and has output 0. None = no padding.
        norm: as in `memory_caching`.
        gate_bias: as in `memory_caching`.

    Raises:
        ValueError: an argument is missing, has a wrong shape, or is an unknown name.
    """
    check_streaming_config(config)
    tensors = {"q": q, "k": k, "v": v, "u": u}
    check_arguments(
        tensors, initial, coefficients, config, norm, mask, is_static, gate_bias=gate_bias
    )
    b, t = q.shape[:2]
    if cache.position.shape != (b,):
        raise ValueError(f"cache has {cache.position.shape[0]} rows: must have {b}, like q")
    valid = jnp.ones((b, t), bool)
    if count is not None:
        valid = first_tokens(count, t)
    mask = valid if mask is None else mask & valid
    if not b:
        arguments = q, k, v, u, coefficients, mask, valid
        q, k, v, u, coefficients, mask, valid = jax.tree.map(add_row, arguments)
        cache = map_rows(add_row, cache)
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)
    tokens = _zero_masked(q, k, v, u, coefficients, mask)
    cache = cast_cache(cache, state_dtype(q.dtype))
    memory = make_memory(config.memory, norm, initial)
    output, new, gates = extend_chunks(memory, config, tokens, initial, count, cache, gate_bias)
    head_mask = mask[:, :, None, None]
    output = jnp.where(head_mask, output, jnp.zeros_like(output)).astype(v.dtype)
    result = Result(
        nan_past_capacity(output, new), new, jnp.where(head_mask, gates, jnp.zeros_like(gates))
    )
    return result if b else _drop_rows(result)


def _drop_rows(result: Result) -> Result:
    """Drop the row that was added to an empty batch."""
    output, cache, gates, inner = result
    output, gates, inner = jax.tree.map(drop_rows, (output, gates, inner))
    return Result(output, map_rows(drop_rows, cache), gates, inner)


def _run_chunks(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: Plan,
    gate_bias: Array | None,
    *,
    inspect: bool,
) -> tuple[Array, Cache, Array, InnerLoop | None]:
    q, k, v, u, coefficients, mask = tokens
    # Under `soup`, a read mixes all cached memories, so it must follow the write.
    read_after_write = inspect or (config.mixes_layers and plan.segments > 1)
    inputs, keys = memory.encode_tokens(q), memory.encode_tokens(k)
    queries = inputs if config.memory.gradient_uses_weights and not read_after_write else None
    writes = write_chunks(memory, keys, v, initial, coefficients, mask, plan, q=queries)
    pools = pool_keys(k, mask, plan, config)
    segment = jnp.asarray(plan.segment_of, jnp.int32)
    cached = stored = Segments(writes.ends, pools.segment, pools.length)
    retention: MaybeArray = ()
    if config.sums_states:
        retention = segment_retention(coefficients.retention, plan)
    if config.has_buckets:
        cached = cached._replace(pool_sum=pools.total, retention=retention)
        cached, stored = _merge_buckets(memory, config, cached, plan)
        scores = bucket_scores(u, cached.pool, plan, config)
        read_gates = compute_bucket_gates(u, scores, pools.running, segment, config, gate_bias)
    else:
        read_gates = compute_gates(u, cached.pool, pools.running, segment, config, gate_bias)
    output = read_all(
        memory, config, writes._replace(ends=cached.weights), inputs, *read_gates, plan
    )
    gates = scatter_gates(*read_gates, plan.slots)
    segments = Segments(writes.ends, pools.segment, pools.length, pools.total, retention)
    cache = _make_cache(config, stored, segments, writes.final, plan)
    inner = None
    if inspect:
        inner = measure_writes(memory, writes, keys, v, coefficients, mask, plan)
    return output, cache, gates, inner


def _cache_of_blocks(
    memory: Memory, config: MCConfig, result: BlockResult, split: TokenSplit, plan: Plan
) -> Cache:
    """Return the cache after a sequence that was split over devices."""

    def in_order(x: Array) -> Array:
        if not split.paired:
            return x
        parts = x.reshape(x.shape[0], split.blocks, -1, *x.shape[2:])
        return jnp.take(parts, split.places, axis=1).reshape(x.shape)

    segments = jax.tree.map(in_order, result.segments)
    stored = Segments(segments.weights, segments.pool, segments.length)
    if config.has_buckets:
        stored = _merge_buckets(memory, config, segments, plan)[1]
    state = jax.tree.map(lambda x: in_order(x)[:, -1], result.state)
    return _make_cache(config, stored, segments, state, plan)


def _merge_buckets(
    memory: Memory, config: MCConfig, segments: Segments, plan: Plan
) -> tuple[Segments, Segments]:
    """Return the bucket that ends with each segment, and the buckets after the last token."""
    empty, zero = empty_buckets(segments, plan.slots), jnp.zeros_like(segments.length[0, :1])
    merged = merge_segments(memory, config, segments, empty, zero)
    return merged, gather_buckets(merged, jnp.asarray(plan.final_buckets[None], jnp.int32))


def _make_cache(
    config: MCConfig, stored: Segments, segments: Segments, state: MemoryState, plan: Plan
) -> Cache:
    """Return the cache after the last token.

    Args:
        config: the layer's configuration.
        stored: the cached memories.
        segments: all segments [b, n, ...], with the sums of their keys.
        state: the online memory [b, h, ...].
        plan: the segments.
    """
    length = segments.length[:, -1]
    slot = NO_SLOT if config.has_buckets else plan.segments - 1
    return Cache(
        stored=stored,
        total=sum_complete(config, segments.weights, plan),
        state=state,
        pool_sum=segments.pool_sum[:, -1],
        pool=segments.pool[:, -1],
        length=length,
        slot=jnp.full_like(length, slot),
        position=jnp.full_like(length, plan.tokens),
        capacity=jnp.asarray(plan.capacity, jnp.int32),
        retention=jax.tree.map(lambda x: x[:, -1], segments.retention),
    )


def _zero_masked(
    q: Array, k: Array, v: Array, u: Array | None, coefficients: Coefficients, mask: Array
) -> Tokens:
    # Values at masked tokens may be NaN, which a mask applied after a product would not remove.
    head_mask = mask[:, :, None, None]
    q, k, v = (jnp.where(head_mask, x, jnp.zeros_like(x)) for x in (q, k, v))
    u = q if u is None else jnp.where(head_mask, u, jnp.zeros_like(u))
    dtype = state_dtype(q.dtype)
    coefficients = jax.tree.map(
        lambda x: jnp.where(mask[:, :, None], x.astype(dtype), jnp.ones_like(x, dtype=dtype)),
        coefficients,
    )
    return Tokens(q, k, v, u, coefficients, mask)
