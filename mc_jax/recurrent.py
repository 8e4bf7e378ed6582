"""Reference implementation: a recurrence that writes, then reads, one token at a time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.backends import Coefficients, Memory, MemoryState, Tokens, Weights
from mc_jax.buckets import carry_segment
from mc_jax.cache import (
    Cache,
    Segments,
    add_axis,
    empty_cache,
    start_state,
    sum_complete,
    tree_where,
    write_slots,
)
from mc_jax.gates import dense_gates, finish_pooling, gate_scores
from mc_jax.numerics import Array
from mc_jax.reads import read_token


class Token(NamedTuple):
    """One token of each sequence, with its segment and chunk boundaries."""

    q: Array  # [b, h, k]
    k: Array  # [b, h, k]
    v: Array  # [b, h, v]
    u: Array  # [b, h, k]
    coefficients: Coefficients  # each [b, h]
    mask: Array  # bool [b]
    segment: Array  # int32 []
    starts_segment: Array  # bool []
    starts_chunk: Array  # bool []
    completes_chunk: Array  # bool []
    completes_segment: Array  # bool []


def run_tokens(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: Plan,
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
    by_token = jax.tree.map(lambda x: x.swapaxes(0, 1), tokens)
    token_indices = (
        plan.segment_of.astype(np.int32),
        plan.starts_segment,
        plan.starts_chunk,
        plan.completes_chunk,
        plan.completes_segment,
    )
    by_step = Token(*(*by_token, *map(jnp.asarray, token_indices)))

    def step(cache: Cache, token: Token) -> tuple[Cache, tuple[Array, Array]]:
        return run_token(memory, config, start, cache, token, gate_bias)

    cache = empty_cache(start, tokens.k[:, 0], config, plan.slots, plan.capacity, total=False)
    cache, (output, gates) = jax.lax.scan(step, cache, by_step)
    cache = cache._replace(total=sum_complete(config, cache.stored.weights, plan))
    return output.swapaxes(0, 1), cache, gates.swapaxes(0, 1)


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
    if config.state_init_mode == "restart":
        state = _where(token.starts_segment, start, state)
    if memory.config.gradient_uses_weights:
        one = jax.tree.map(jnp.ones_like, state.retention)
        anchored = state._replace(anchor=state.weights, retention=one)
        state = _where(token.starts_chunk, anchored, state)
    q, k = (memory.encode(x[..., None, :]) for x in (token.q, token.k))
    updated = memory.update(state, k, token.v[..., None, :], token.coefficients)
    if memory.config.updates_at_chunk_end:
        retention = state.retention * token.coefficients.retention
        updated = updated._replace(retention=retention)
    state = tree_where(token.mask, updated, state)

    pool_sum = _where(token.starts_segment, jnp.zeros_like(cache.pool_sum), cache.pool_sum)
    pool_sum = pool_sum + token.k.astype(pool_sum.dtype)
    count = _where(token.starts_segment, jnp.zeros_like(cache.length), cache.length)
    count = count + token.mask.astype(count.dtype)
    running = finish_pooling(pool_sum, count[:, None], config)

    segment = token.segment[None]
    u, pools = token.u[:, None], cache.stored.pool
    score = gate_scores(u, pools, running[:, None], segment, config, gate_bias)
    gates = dense_gates(score, segment, config)[:, 0]
    output = read_token(memory, config, state.weights, cache.stored.weights, q[..., 0, :], gates)
    if memory.config.updates_at_chunk_end:
        state = jax.lax.cond(token.completes_chunk, memory.end_chunk, lambda x: x, state)
    online, stored, slot = Segments(state.weights, running, count), cache.stored, cache.slot
    retention = cache.retention
    if config.sums_states:
        before = _where(token.starts_segment, jnp.ones_like(retention), retention)
        retention = before * token.coefficients.retention
    if not config.has_buckets:
        slot = jnp.full_like(slot, token.segment)
        stored = write_slots(stored, add_axis(online), slot[:, None])
    else:
        block = online._replace(pool_sum=pool_sum, retention=retention)
        carried = carry_segment(memory, config, block, stored, token.segment)
        stored = _where(token.completes_segment, carried, stored)
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


def _where(condition: Array, on_true, on_false):  # type: ignore[no-untyped-def]
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)
