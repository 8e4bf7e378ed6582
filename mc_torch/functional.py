"""Memory Caching without parameters: write, cache, gate, read."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mc_core.argument_checks import check_arguments, check_method
from mc_core.cache_checks import NO_SLOT
from mc_core.config import MCConfig
from mc_core.segmentation import check_streaming_config
from mc_torch.backends import Coefficients, Memory, Norm, Tokens, Weights, make_memory
from mc_torch.buckets import (
    bucket_scores,
    compute_bucket_gates,
    empty_buckets,
    gather_buckets,
    merge_segments,
    segment_retention,
)
from mc_torch.cache import Cache, MaybeArray, Segments, cast_cache, nan_past_capacity, sum_complete
from mc_torch.cache_rows import add_row, drop_rows, map_rows
from mc_torch.chunk_layout import TensorPlan, first_tokens, make_plan
from mc_torch.chunked import write_chunks
from mc_torch.gates import compute_gates, pool_keys, scatter_gates
from mc_torch.inspection import InnerLoop, measure_writes
from mc_torch.numerics import Array, is_static, state_dtype, tree_map
from mc_torch.reads import read_all
from mc_torch.recurrent import run_tokens
from mc_torch.streaming import extend_chunks


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

    Raises:
        ValueError: an argument is missing, has a wrong shape, or is an unknown name.
    """
    check_method(method, inspect)
    tensors = {"q": q, "k": k, "v": v, "u": u}
    check_arguments(
        tensors, initial, coefficients, config, norm, mask, is_static, gate_bias=gate_bias
    )
    b, t = q.shape[:2]
    plan = make_plan(t, config, segment_lengths, q.device)
    mask = torch.ones(b, t, dtype=torch.bool, device=q.device) if mask is None else mask
    if not b:
        # Reshapes and matrix products may fail for an empty batch: add a row, drop it at the end.
        arguments = q, k, v, u, coefficients, mask
        q, k, v, u, coefficients, mask = tree_map(add_row, arguments)
    tokens = _zero_masked(q, k, v, u, coefficients, mask)
    memory = make_memory(config.memory, norm, initial)
    inner = None
    if method == "recurrent":
        output, cache, gates = run_tokens(memory, config, tokens, initial, plan, gate_bias)
    else:
        output, cache, gates, inner = _run_chunks(
            memory, config, tokens, initial, plan, gate_bias, inspect=inspect
        )
    head_mask = mask[:, :, None, None]
    output = torch.where(head_mask, output, torch.zeros_like(output)).to(v.dtype)
    gates = torch.where(head_mask, gates, torch.zeros_like(gates))
    result = Result(output, cache, gates, inner)
    return result if b else _drop_rows(result)


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
    valid = torch.ones(b, t, dtype=torch.bool, device=q.device)
    if count is not None:
        valid = first_tokens(count, t)
    mask = valid if mask is None else mask & valid
    if not b:
        arguments = q, k, v, u, coefficients, mask, valid
        q, k, v, u, coefficients, mask, valid = tree_map(add_row, arguments)
        cache = map_rows(add_row, cache)
    count = torch.sum(valid, dim=1, dtype=torch.int32)
    tokens = _zero_masked(q, k, v, u, coefficients, mask)
    cache = cast_cache(cache, state_dtype(q.dtype))
    memory = make_memory(config.memory, norm, initial)
    output, new, gates = extend_chunks(memory, config, tokens, initial, count, cache, gate_bias)
    head_mask = mask[:, :, None, None]
    output = torch.where(head_mask, output, torch.zeros_like(output)).to(v.dtype)
    result = Result(
        nan_past_capacity(output, new), new, torch.where(head_mask, gates, torch.zeros_like(gates))
    )
    return result if b else _drop_rows(result)


def _drop_rows(result: Result) -> Result:
    """Drop the row that was added to an empty batch."""
    output, cache, gates, inner = result
    output, gates, inner = tree_map(drop_rows, (output, gates, inner))
    return Result(output, map_rows(drop_rows, cache), gates, inner)


def _run_chunks(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: TensorPlan,
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
    segment = torch.tensor(plan.segment_of, device=q.device)
    cached = stored = Segments(writes.ends, pools.segment, pools.length)
    retention: MaybeArray = ()
    if config.sums_states:
        retention = segment_retention(coefficients.retention, plan)
    if config.has_buckets:
        cached = cached._replace(pool_sum=pools.total, retention=retention)
        empty, zero = empty_buckets(cached, plan.slots), torch.zeros_like(pools.length[0, :1])
        cached = merge_segments(memory, config, cached, empty, zero)
        stored = gather_buckets(cached, plan.final_buckets[None])
        scores = bucket_scores(u, cached.pool, plan, config)
        read_gates = compute_bucket_gates(u, scores, pools.running, segment, config, gate_bias)
    else:
        read_gates = compute_gates(u, cached.pool, pools.running, segment, config, gate_bias)
    output = read_all(
        memory, config, writes._replace(ends=cached.weights), inputs, *read_gates, plan
    )
    gates = scatter_gates(*read_gates, plan.slots)
    length = pools.length[:, -1]
    slot = NO_SLOT if config.has_buckets else plan.segments - 1
    cache = Cache(
        stored=stored,
        total=sum_complete(config, writes.ends, plan),
        state=writes.final,
        pool_sum=pools.total[:, -1],
        pool=pools.segment[:, -1],
        length=length,
        slot=torch.full_like(length, slot),
        position=torch.full_like(length, plan.tokens),
        capacity=torch.full((), plan.capacity, dtype=torch.int32, device=q.device),
        retention=tree_map(lambda x: x[:, -1], retention),
    )
    inner = None
    if inspect:
        inner = measure_writes(memory, writes, keys, v, coefficients, mask, plan)
    return output, cache, gates, inner


def _zero_masked(
    q: Array, k: Array, v: Array, u: Array | None, coefficients: Coefficients, mask: Array
) -> Tokens:
    # Values at masked tokens may be NaN, which a mask applied after a product would not remove.
    head_mask = mask[:, :, None, None]
    q, k, v = (torch.where(head_mask, x, torch.zeros_like(x)) for x in (q, k, v))
    u = q if u is None else torch.where(head_mask, u, torch.zeros_like(u))
    dtype = state_dtype(q.dtype)
    coefficients = tree_map(
        lambda x: torch.where(mask[:, :, None], x.to(dtype), torch.ones_like(x, dtype=dtype)),
        coefficients,
    )
    return Tokens(q, k, v, u, coefficients, mask)
