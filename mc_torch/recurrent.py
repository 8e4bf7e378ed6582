"""Reference implementation: a recurrence that writes, then reads, one token at a time."""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.backends import Coefficients, Memory, MemoryState, Tokens, Weights
from mc_torch.buckets import carry_segment
from mc_torch.cache import (
    Cache,
    Segments,
    add_axis,
    empty_cache,
    start_state,
    sum_complete,
    tree_where,
    write_slots,
)
from mc_torch.chunk_layout import TensorPlan
from mc_torch.gates import dense_gates, finish_pooling, gate_scores
from mc_torch.numerics import Array, tree_map, unstack
from mc_torch.reads import read_token


class Token(NamedTuple):
    """One token of each sequence, with its segment and chunk boundaries."""

    q: Array  # [b, h, k]
    k: Array  # [b, h, k]
    v: Array  # [b, h, v]
    u: Array  # [b, h, k]
    coefficients: Coefficients  # each [b, h]
    mask: Array  # bool [b]
    segment: int  # its segment
    starts_segment: bool
    starts_chunk: bool
    completes_chunk: bool
    completes_segment: bool


def run_tokens(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: TensorPlan,
    gate_bias: Array | None = None,
) -> tuple[Array, Cache, Array]:
    """Run a sequence token by token.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        tokens: the sequence.
        initial: weights W_0 per layer, each [h, o, i].
        plan: the segments and chunks.
        gate_bias: biases [h] of the online memory's score, or None.

    Returns:
        output [b, t, h, v], the cache after the last token, gates [b, t, h, n + 1].
    """
    start = start_state(memory, initial, tokens.k[:, 0, :, None], tokens.v[:, 0, :, None])
    by_token = unstack(tokens, dim=1)
    token_indices = zip(
        plan.segment_of,
        plan.starts_segment,
        plan.starts_chunk,
        plan.completes_chunk,
        plan.completes_segment,
        strict=True,
    )
    cache = empty_cache(start, tokens.k[:, 0], config, plan.slots, plan.capacity, total=False)
    reads = []
    for inputs, indices in zip(by_token, token_indices, strict=True):
        token = Token._make((*inputs, *indices))
        cache, read = run_token(memory, config, start, cache, token, gate_bias)
        reads.append(read)
    cache = cache._replace(total=sum_complete(config, cache.stored.weights, plan))
    output, gates = (torch.stack(x, dim=1) for x in zip(*reads, strict=True))
    return output, cache, gates


def run_token(
    memory: Memory,
    config: MCConfig,
    start: MemoryState,
    cache: Cache,
    token: Token,
    gate_bias: Array | None = None,
) -> tuple[Cache, tuple[Array, Array]]:
    """Write one token, then read it, as in sections 2 to 5.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        start: the initial state, for segments that restart.
        cache: state before the token.
        token: the token.
        gate_bias: biases [h] of the online memory's score, or None.

    Returns:
        the new cache; output [b, h, v] and gates [b, h, n + 1].
    """
    state = cache.state
    if config.state_init_mode == "restart" and token.starts_segment:
        state = start
    if memory.config.gradient_uses_weights and token.starts_chunk:
        one = tree_map(torch.ones_like, state.retention)
        state = state._replace(anchor=state.weights, retention=one)
    q, k = (memory.encode(x[..., None, :]) for x in (token.q, token.k))
    updated = memory.update(state, k, token.v[..., None, :], token.coefficients)
    if memory.config.updates_at_chunk_end:
        retention = state.retention * token.coefficients.retention
        updated = updated._replace(retention=retention)
    state = tree_where(token.mask, updated, state)

    pool_sum, count = cache.pool_sum, cache.length
    if token.starts_segment:
        pool_sum, count = torch.zeros_like(pool_sum), torch.zeros_like(count)
    pool_sum = pool_sum + token.k.to(pool_sum.dtype)
    count = count + token.mask.to(count.dtype)
    running = finish_pooling(pool_sum, count[:, None], config)

    segment = torch.full((1,), token.segment, device=running.device)
    u, pools = token.u[:, None], cache.stored.pool
    score = gate_scores(u, pools, running[:, None], segment, config, gate_bias)
    gates = dense_gates(score, segment, config)[:, 0]
    output = read_token(memory, config, state.weights, cache.stored.weights, q[..., 0, :], gates)
    if memory.config.updates_at_chunk_end and token.completes_chunk:
        state = memory.end_chunk(state)
    online, stored, slot = Segments(state.weights, running, count), cache.stored, cache.slot
    retention = cache.retention
    if config.sums_states:
        before = torch.ones_like(retention) if token.starts_segment else retention
        retention = before * token.coefficients.retention
    if not config.has_buckets:
        slot = torch.full_like(slot, token.segment)
        stored = write_slots(stored, add_axis(online), slot[:, None])
    elif token.completes_segment:
        block = online._replace(pool_sum=pool_sum, retention=retention)
        stored = carry_segment(memory, config, block, stored, token.segment)
    cache = cache._replace(
        stored=stored,
        state=state,
        pool_sum=pool_sum,
        pool=running,
        length=count,
        slot=slot,
        position=cache.position + 1,
        retention=retention,
    )
    return cache, (output, gates)
