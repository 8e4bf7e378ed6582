"""The definition: a loop over tokens that writes, caches, gates and reads one at a time."""

from typing import NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.aggregate import read_token
from mc_torch.backends import Coefficients, Memory, MemoryState, Tokens, Weights
from mc_torch.cache import (
    Cache,
    Segments,
    add_axis,
    choose,
    empty_cache,
    put_slots,
    start_state,
    sum_complete,
)
from mc_torch.gates import gate_densely, pooled, scores
from mc_torch.layout import TensorPlan
from mc_torch.numerics import Array, unstack


class Token(NamedTuple):
    """One token of every sequence, and where it stands."""

    q: Array  # [b, h, k], as k and u
    k: Array
    v: Array  # [b, h, v]
    u: Array
    coefficients: Coefficients  # each [b, h]
    real: Array  # bool [b]
    segment: int  # its segment
    opens_segment: bool
    opens_chunk: bool


def run_tokens(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    plan: TensorPlan,
) -> tuple[Array, Cache, Array]:
    """Run a sequence token by token.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        tokens: the sequence.
        initial: W_0, first layer first, each [h, o, i].
        plan: the segments and chunks.

    Returns:
        output [b, t, h, v], the cache after the last token, gates [b, t, h, n + 1].
    """
    start = start_state(memory, initial, tokens.k[:, 0, :, None], tokens.v[:, 0, :, None])
    by_token = unstack(tokens, dim=1)
    where = zip(plan.segment_of, plan.opens_segment, plan.opens_chunk, strict=True)
    cache = empty_cache(start, tokens.k[:, 0], plan.segments, plan.limit, total=False)
    reads = []
    for here, there in zip(by_token, where, strict=True):
        cache, read = run_token(memory, config, start, cache, Token._make((*here, *there)))
        reads.append(read)
    cache = cache._replace(total=sum_complete(config, cache.stored.weights, plan))
    output, gates = (torch.stack(x, dim=1) for x in zip(*reads, strict=True))
    return output, cache, gates


def run_token(
    memory: Memory, config: MCConfig, start: MemoryState, cache: Cache, token: Token
) -> tuple[Cache, tuple[Array, Array]]:
    """Write one token, then read it: sections 2 to 5, in their order.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        start: the state before a first token, for segments that restart.
        cache: the stream so far.
        token: the token.

    Returns:
        the new cache; output [b, h, v] and gates [b, h, n + 1].
    """
    state = cache.state
    if config.state_init_mode == "restart" and token.opens_segment:
        state = start
    if memory.config.gradient_uses_weights and token.opens_chunk:
        state = state._replace(anchor=state.weights)
    written = memory.update(state, token.k[..., None, :], token.v[..., None, :], token.coefficients)
    state = choose(token.real, written, state)

    pool_sum, count = cache.pool_sum, cache.length
    if token.opens_segment:
        pool_sum, count = torch.zeros_like(pool_sum), torch.zeros_like(count)
    pool_sum = pool_sum + token.k.to(pool_sum.dtype)
    count = count + token.real.to(count.dtype)
    running = pooled(pool_sum, count[:, None], config.pooling)

    segment = torch.full((1,), token.segment, device=running.device)
    score = scores(token.u[:, None], cache.stored.pool, running[:, None], segment, config)
    gates = gate_densely(score, segment, config)[:, 0]
    output = read_token(memory, config, state.weights, cache.stored.weights, token.q, gates)
    here = Segments(state.weights, running, count)
    slot = torch.full_like(cache.slot, token.segment)
    cache = cache._replace(
        stored=put_slots(cache.stored, add_axis(here), slot[:, None]),
        state=state,
        pool_sum=pool_sum,
        pool=running,
        length=count,
        slot=slot,
        position=cache.position + 1,
    )
    return cache, (output, gates)
