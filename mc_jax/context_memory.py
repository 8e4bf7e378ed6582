"""Memory Caching of a sequence whose tokens are split over devices (see `mc_jax.context`).

1. Each device writes the segments of its blocks, as if every block was a sequence.
2. One all-gather gives every device the end states and pooled keys of all segments.
3. In `checkpoint` mode, the states so far are those of blocks alone. Prefix sums over blocks give
   the state before each block, whose decay is added. Writes must be `W_t = α_t W_{t-1} + U_t`.
4. Each token reads its online memory and the cached ones of earlier segments, of all devices.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import FENWICK, MCConfig
from mc_core.segmentation import bucket_ends, make_plan
from mc_jax.backends import MemoryState, Norm, Tokens, Weights, make_memory
from mc_jax.buckets import (
    compute_bucket_gates,
    empty_buckets,
    merge_segments,
    segment_retention,
    uses_pools,
)
from mc_jax.cache import MaybeArray, Segments
from mc_jax.chunk_layout import from_segments, to_segments
from mc_jax.chunked import WriteResult, write_chunks
from mc_jax.context import AXIS, TokenSplit, block_range, gather_blocks, map_blocks, take_blocks
from mc_jax.context_reads import sum_split_bucket_reads, sum_split_reads
from mc_jax.context_scan import (
    DeviceBlocks,
    add_carried,
    carry_states,
    chunk_retention,
    previous_tokens,
)
from mc_jax.gates import Gates, Pools, compute_gates, finish_pooling, pool_keys, scatter_gates
from mc_jax.numerics import Array, einsum_f32
from mc_jax.reads import read_dense, read_online, read_soup, read_sparse, read_sum
from mc_jax.sparse_reads import ROW_BLOCK

MIN_ROW_BLOCK = 16  # smallest number of rows of a block: smaller products are inefficient


class BlockResult(NamedTuple):
    """Results for all blocks; tokens and segments are in the order of the split."""

    output: Array  # [b, t, h, v]
    gates: Array  # [b, t, h, n + 1]
    segments: Segments  # memory, pool, length, sum of the keys and retention [b, n, ...]
    state: MemoryState  # online memory after each block [b, blocks, h, ...]


def check_split(config: MCConfig, tokens: int, split: TokenSplit, lengths: Any = None) -> None:
    """Check that a layer can split a sequence over devices.

    Raises:
        ValueError: the message names the field, its value and what is allowed.
    """
    where = f"on a mesh with {AXIS} = {split.devices}"
    if lengths is not None:
        raise ValueError(f"segment_lengths = {list(lengths)}: must be None {where}")
    if config.segmentation not in ("constant", FENWICK):
        raise ValueError(
            f"segmentation = {config.segmentation!r}: must be 'constant' or {FENWICK!r} {where}"
        )
    if config.state_init_mode == "checkpoint" and not config.memory.decay_only_transition:
        raise ValueError(
            f"state_init_mode = 'checkpoint': must be 'restart' for a {config.memory.kind} memory "
            f"{where}, because its writes depend on the memory before them"
        )
    split.check(tokens, config.segment_size, "segment_size")


@partial(jax.jit, static_argnames=("config", "split"))
def run_blocks(
    tokens: Tokens,
    initial: Weights,
    norm: Norm,
    gate_bias: Array | None,
    *,
    config: MCConfig,
    split: TokenSplit,
) -> BlockResult:
    """Write and read a sequence, split over the devices of the context axis.

    Args:
        tokens: [b, t, ...], in the order of the split.
        initial: weights W_0 per layer, each [h, o, i].
        norm: (gain, bias) of the memory's layer norm, each [h, v], or None.
        gate_bias: biases [h] of the online memory's score, or None.
        config: the layer's configuration, checked by `check_split`.
        split: the split of the tokens.
    """
    body = partial(_run_blocks, config=config, split=split)
    return map_blocks(body, split, tokens, (initial, norm, gate_bias))


def _run_blocks(
    blocks: Array, tokens: Tokens, replicated: Any, *, config: MCConfig, split: TokenSplit
) -> BlockResult:
    initial, norm, gate_bias = replicated
    memory = make_memory(config.memory, norm, initial)
    plan = make_plan(tokens.mask.shape[1] // blocks.size, config)
    context = DeviceBlocks(memory, config, split, plan, blocks)

    writes = _write(context, tokens, initial)  # 1
    rows = jax.tree.map(context.to_rows, tokens)
    pools = pool_keys(rows.k, rows.mask, plan, config)
    writes, cached = _gather(context, writes, pools, rows, initial)  # 2, 3

    running = context.from_rows(pools.running)
    segment = block_range(blocks, plan.tokens) // config.segment_size
    gates = _gates(context, tokens.u, cached.pool, running, segment, gate_bias)
    output = _read(context, writes, cached.weights, memory.encode_tokens(tokens.q), gates, segment)

    slots = bucket_ends(context.segments, [0]).shape[1] if plan.has_buckets else context.segments
    retention: MaybeArray = ()
    if config.sums_states:
        retention = segment_retention(rows.coefficients.retention, plan)
    own = Segments(writes.ends, pools.segment, pools.length, pools.total, retention)
    return BlockResult(
        output=output,
        gates=scatter_gates(*gates, slots),
        segments=jax.tree.map(context.from_rows, own),
        state=jax.tree.map(lambda x: context.from_rows(x[:, None]), writes.final),
    )


def _write(context: DeviceBlocks, tokens: Tokens, initial: Weights) -> WriteResult:
    """Write the blocks of a device; carried states begin at zero."""
    memory, config, plan = context.memory, context.config, context.plan
    q, k, v = memory.encode_tokens(tokens.q), memory.encode_tokens(tokens.k), tokens.v
    previous: Weights = ()
    if config.state_init_mode == "checkpoint":
        initial = jax.tree.map(jnp.zeros_like, initial)
        if config.memory.uses_previous_token:
            previous = previous_tokens(context, (k, v), tokens.mask)
    read_in_scan = config.memory.gradient_uses_weights and not config.mixes_layers
    q, k, v, coefficients, mask = jax.tree.map(
        context.to_rows, (q, k, v, tokens.coefficients, tokens.mask)
    )
    queries = q if read_in_scan else None
    return write_chunks(
        memory, k, v, initial, coefficients, mask, plan, q=queries, previous=previous
    )


def _gather(
    context: DeviceBlocks, writes: WriteResult, pools: Pools, rows: Tokens, initial: Weights
) -> tuple[WriteResult, Segments]:
    """Return the writes, with the state before each block, and the cached memories [b, n, ...].

    Fields of the cached memories that no read uses are () or zero.
    """
    memory, config, plan = context.memory, context.config, context.plan
    carries = config.state_init_mode == "checkpoint"
    h = pools.segment.shape[2]
    parts: dict[str, Any] = {}
    if carries:
        chunk_decay = jnp.cumprod(chunk_retention(writes), axis=0)  # up to the end of each chunk
        decay = chunk_decay[plan.last_chunk].swapaxes(0, 1)  # [b * s, n, h]
        parts |= {"weights": writes.ends, "decay": decay}
    if config.rule.reads_cache:
        parts["weights"] = writes.ends
        if config.sums_states:
            parts["retention"] = segment_retention(rows.coefficients.retention, plan)
    else:
        parts = jax.tree.map(lambda x: x[:, -1:], parts)
    if uses_pools(config) and config.has_buckets:
        length = jnp.broadcast_to(pools.length[..., None], (*pools.length.shape, h))
        parts |= {"total": pools.total, "length": length.astype(pools.total.dtype)}
    elif uses_pools(config):
        parts["pool"] = pools.segment
    parts = _gather_packed(context, parts) if parts else {}

    if carries:
        before, parts["weights"] = carry_states(context, parts["weights"], parts["decay"], initial)
        writes = add_carried(context, writes, before, chunk_decay, decay)
    b, k = rows.k.shape[0] // context.blocks.size, pools.segment.shape[-1]
    zero = jnp.zeros_like(pools.segment, shape=(b, context.segments, h, k))
    if not config.rule.reads_cache:
        return writes, Segments((), zero, zero[..., 0, 0])
    cached = Segments(parts["weights"], parts.get("pool", zero), zero[..., 0, 0])
    if not config.has_buckets:
        return writes, cached
    total, length = parts.get("total", zero), parts.get("length", zero[..., 0])[..., 0]
    cached = Segments(
        weights=cached.weights,
        pool=finish_pooling(total, length[..., None].round().astype(jnp.int32), config),
        length=length.round().astype(jnp.int32),
        pool_sum=total,
        retention=parts.get("retention", ()),
    )
    slots = bucket_ends(context.segments, [0]).shape[1]
    none = jnp.zeros_like(cached.length[0, :1])
    return writes, merge_segments(memory, config, cached, empty_buckets(cached, slots), none)


def _gather_packed(context: DeviceBlocks, parts: Any) -> Any:
    """Gather arrays [b * s, n, h, ...] of all devices as one: each [b, blocks * n, h, ...]."""
    leaves, treedef = jax.tree.flatten(parts)
    flat = [x.reshape(*x.shape[:3], -1) for x in leaves]
    ends = [sum(x.shape[-1] for x in flat[: i + 1]) for i in range(len(flat) - 1)]
    packed = context.from_rows(jnp.concatenate(flat, axis=-1))
    packed = gather_blocks(packed, context.split)
    gathered = jnp.split(packed, ends, axis=-1)
    shaped = [y.reshape(*y.shape[:3], *x.shape[3:]) for x, y in zip(leaves, gathered, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def _gates(
    context: DeviceBlocks, u: Array, pool: Array, running: Array, segment: Array, bias: Array | None
) -> Gates:
    """Compute the gates of a device's tokens [b, t, ...], in segments [t] of the sequence."""
    config, plan = context.config, context.plan
    if not config.has_buckets:
        return compute_gates(u, pool, running, segment, config, bias)
    ends = bucket_ends(context.segments, range(context.segments))
    scores = jnp.zeros_like(pool, shape=(*u.shape[:3], ends.shape[1]))
    if uses_pools(config):
        pool = jax.lax.stop_gradient(pool) if config.detach_cached_context else pool
        index = jnp.asarray(ends.clip(max=context.segments - 1), segment.dtype)
        own = take_blocks(index, context.blocks, context.split, axis=0)  # [s * n, e]
        pools = context.to_rows(jnp.take(pool, own, axis=1))  # [b * s, n, e, h, k]
        connectors = to_segments(context.to_rows(u.astype(pool.dtype)), plan)
        scores = einsum_f32("bhnck,bnehk->bhnce", connectors, pools, exact=True)
        scores = context.from_rows(from_segments(scores, plan))
    return compute_bucket_gates(u, scores, running, segment, config, bias)


def _read(
    context: DeviceBlocks,
    writes: WriteResult,
    cached: Weights,
    q: Array,
    gates: Gates,
    segment: Array,
) -> Array:
    """Read the online and the cached memories by encoded queries [b, t, h, k]: [b, t, h, v]."""
    memory, config, plan = context.memory, context.config, context.plan
    cached = jax.lax.stop_gradient(cached) if config.detach_cached_states else cached
    rows, weights = context.to_rows(q), context.to_rows(gates.weights)
    sum_reads = partial(
        sum_split_bucket_reads if config.has_buckets else sum_split_reads,
        blocks=context.blocks,
        split=context.split,
    )
    if config.rule.reads_cache and config.mixes_layers:
        soup = read_soup(memory, writes, cached, rows, weights, plan, sum_reads=sum_reads)
        return context.from_rows(soup)
    online = context.from_rows(read_online(memory, writes, rows, plan)) * gates.weights[..., -1:]
    if not config.rule.reads_cache:
        return online
    if config.rule.sparse:
        selected = _selected_ends(context, gates.selected, segment)
        # A device has few rows per memory: with smaller blocks, at most as much padding as rows.
        rows_per_memory = selected.shape[1] * selected.shape[3] // context.segments
        row_block = min(ROW_BLOCK, max(MIN_ROW_BLOCK, rows_per_memory // 8 * 8))
        weight = gates.weights[..., :-1]
        return online + read_sparse(memory, cached, q, weight, selected, row_block=row_block)
    if config.reads_sum:
        own = tuple(context.to_rows(take_blocks(w, context.blocks, context.split)) for w in cached)
        base = tuple(_sum_before(context, w) for w in cached)
        read = context.from_rows(read_sum(memory, own, rows, plan, base=base))
        # All cached memories have the weight of the first one, and the first segment has none.
        return online + read * gates.weights[..., :1]
    dense = read_dense(memory, cached, rows, weights, plan, sum_reads=sum_reads)
    return online + context.from_rows(dense)


def _selected_ends(context: DeviceBlocks, selected: Array | None, segment: Array) -> Array:
    """Return the memories of the sequence that tokens [b, t, h, m] selected; n = unused."""
    assert selected is not None
    if not context.config.has_buckets:
        return selected
    ends = bucket_ends(context.segments, range(context.segments))
    table = jnp.asarray(ends, selected.dtype)
    table = jnp.concatenate([table, jnp.full_like(table[:, :1], context.segments)], axis=1)
    table = table[segment][None, :, None]
    shape = (*selected.shape[:3], table.shape[-1])
    return jnp.take_along_axis(jnp.broadcast_to(table, shape), selected, axis=-1)


def _sum_before(context: DeviceBlocks, weight: Array) -> Array:
    """Return the sum of all memories before each block, [b * s, h, o, i] of [b, n, h, o, i]."""
    first = context.blocks[:, None] * context.plan.segments
    index = jnp.arange(context.segments, dtype=first.dtype)[None]
    earlier = (index < first).reshape(1, -1, context.segments, 1, 1, 1)
    sums = jnp.sum(jnp.where(earlier, weight[:, None], jnp.zeros_like(weight[:, None])), axis=2)
    return context.to_rows(sums)[:, 0]
