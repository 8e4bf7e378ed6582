"""The next tokens of a stream: the chunked form from a cache, at any position (sections 4 to 6)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_jax.aggregate import read_sparse
from mc_jax.backends import Memory, Tokens, Weights
from mc_jax.backends.base import apply_weights
from mc_jax.cache import Cache, Segments, choose, put_slots, start_state
from mc_jax.chunked import Chunks, Scanned, Writes, online_apply, online_memory, scan_chunks
from mc_jax.gates import Gates, gate, pooled, readable, spread
from mc_jax.grid import Grid, from_places, make_grid, to_places
from mc_jax.numerics import Array, product, running_sum
from mc_jax.slots import SlotRead, sum_over_slots


class StreamPools(NamedTuple):
    """Pooled keys of a call's tokens and chunks."""

    running: Array  # [b, t, h, k] of the token's segment, up to and including the token
    sums: Array  # of the segment's keys after each chunk [g, b, h, k]
    counts: Array  # its real tokens after each chunk, int32 [g, b]


def extend_chunks(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    count: Array,
    cache: Cache,
) -> tuple[Array, Cache, Array]:
    """Write and read the next tokens of a stream.

    Args:
        memory: the memory kind.
        config: the layer's configuration.
        tokens: the next tokens.
        initial: W_0, first layer first, each [h, o, i].
        count: tokens of each row, its first ones, int32 [b]; the others do not exist.
        cache: the stream so far.

    Returns:
        output [b, t, h, v], the new cache, gates [b, t, h, n + 1] over its n slots.
    """
    q = tokens.q
    grid = make_grid(cache.position, count, q.shape[1], config)
    scanned, writes = _write(memory, config, tokens, initial, grid, cache)
    pools = _pool(tokens.k, tokens.mask, grid, cache, config)
    stored, total, totals = _complete(scanned, pools, grid, cache, config)
    if config.detach_cached_states:
        totals = jax.lax.stop_gradient(totals)

    if config.reads_sum:
        queries = to_places(q, grid)
        read = _read_online(memory, writes, queries)
        read = read + memory.read(apply_weights(totals, q.dtype), queries)
        allowed = readable(grid.segment, stored.length.shape[1], config)[:, :, None]
        share = jnp.ones_like(pools.running[..., :1])
        if config.rule.averaged:
            share = share / (grid.segment + 1)[..., None, None].astype(share.dtype)
        output = from_places(read, grid) * share
        gates = allowed.astype(share.dtype) * share
    else:
        found = gate(tokens.u, stored.pool, pools.running, grid.segment, config)
        output = _read(memory, config, writes, stored.weights, q, found, grid)
        gates = spread(*found, stored.length.shape[1])

    new = cache._replace(
        stored=stored,
        total=total,
        state=jax.tree.map(lambda x: x[:, 0], scanned.final),
        pool_sum=pools.sums[-1],
        pool=pooled(pools.sums[-1], pools.counts[-1][:, None], config.pooling),
        length=pools.counts[-1],
        slot=grid.slot,
        position=cache.position + count,
    )
    return output, new, gates


def _write(
    memory: Memory,
    config: MCConfig,
    tokens: Tokens,
    initial: Weights,
    grid: Grid,
    cache: Cache,
) -> tuple[Scanned, Writes]:
    k, v = to_places(tokens.k, grid), to_places(tokens.v, grid)
    at = jax.tree.map(lambda x: to_places(x, grid), tokens.coefficients)
    written = to_places(tokens.mask[:, :, None].astype(at.step.dtype), grid)
    start = start_state(memory, initial, k[0], v[0])
    state = jax.tree.map(lambda x: x[:, None], cache.state)
    restarts = grid.restarts if config.state_init_mode == "restart" else None
    # A soup mixes layer by layer with memories that the write has yet to make.
    early = config.memory.gradient_uses_weights and not config.mixes_layers
    q = to_places(tokens.q, grid) if early else None
    chunks = Chunks(k, v, at, written, q, restarts, grid.opens)
    scanned = scan_chunks(memory, chunks, state, start)
    online = online_memory(scanned, start, restarts)
    return scanned, Writes(online, scanned.read, (), scanned.final)


def _pool(k: Array, mask: Array, grid: Grid, cache: Cache, config: MCConfig) -> StreamPools:
    sums = running_sum(to_places(k.astype(cache.pool_sum.dtype), grid))[:, :, 0]  # [g, b, h, c, k]
    real = to_places(mask[:, :, None].astype(jnp.int32), grid)[:, :, 0, 0]
    counts = jnp.cumsum(real, axis=-1)  # [g, b, c]
    opens = grid.restarts[..., 0]

    def step(carry, chunk):  # type: ignore[no-untyped-def]
        sums, counts, restart = chunk
        carry = choose(restart, jax.tree.map(jnp.zeros_like, carry), carry)
        after = carry[0] + sums[..., -1, :], carry[1] + counts[..., -1]
        return after, (carry, after)

    begin = cache.pool_sum, cache.length
    _, (before, after) = jax.lax.scan(step, begin, (sums, counts, opens))
    sums, counts = before[0][..., None, :] + sums, before[1][..., None] + counts
    running = pooled(sums, counts[:, :, None], config.pooling)
    return StreamPools(from_places(running[:, :, None], grid), *after)


def _complete(
    scanned: Scanned, pools: StreamPools, grid: Grid, cache: Cache, config: MCConfig
) -> tuple[Segments, Weights, Weights]:
    """Return what completed segments leave behind.

    Returns:
        the slots, the sum of all complete segments' weights, and that sum before each chunk
        [g, b, 1, h, o, i]; the sums where reads take them.
    """
    after = tuple(
        jnp.concatenate([before[1:], final[None]])
        for before, final in zip(scanned.before, scanned.final.weights, strict=True)
    )
    total, totals = cache.total, ()
    if config.reads_sum:
        ended = choose(grid.ends, after, jax.tree.map(jnp.zeros_like, after))
        sums = jax.tree.map(
            lambda x, t: t[None, :, None] + jnp.cumsum(x, axis=0), ended, cache.total
        )
        total = jax.tree.map(lambda x: x[-1, :, 0], sums)
        totals = jax.tree.map(jnp.subtract, sums, ended)
    if not cache.stored.length.shape[1]:
        return cache.stored, total, totals
    row = jnp.arange(grid.last.shape[0], dtype=grid.last.dtype)[:, None]
    sums, counts = pools.sums[grid.last, row], pools.counts[grid.last, row]
    done = Segments(
        weights=tuple(x[grid.last, row, 0] for x in after),
        pool=pooled(sums, counts[..., None], config.pooling),
        length=counts,
    )
    return put_slots(cache.stored, done, grid.slots), total, totals


def _read(
    memory: Memory,
    config: MCConfig,
    writes: Writes,
    cached: Weights,
    q: Array,
    gates: Gates,
    grid: Grid,
) -> Array:
    """Read every token's online memory and the cached ones, weighted: [b, t, h, v].

    Takes cached weights [b, n, h, o, i] in slots and q [b, t, h, k].
    """
    if config.detach_cached_states:
        cached = jax.lax.stop_gradient(cached)
    if config.mixes_layers:
        return _read_soup(memory, writes, cached, q, gates.weights, grid)
    online = from_places(_read_online(memory, writes, to_places(q, grid)), grid)
    online = online * gates.weights[..., -1:]
    if not config.rule.reads_cache:
        return online
    if config.rule.sparse:
        assert gates.selected is not None
        return online + read_sparse(memory, cached, q, gates.weights[..., :-1], gates.selected)

    def read(x: Array, weights: Weights) -> Array:
        return memory.read(apply_weights(weights, x.dtype), x)

    return online + _sum_slots(read, q, gates.weights, cached, grid)


def _read_soup(
    memory: Memory, writes: Writes, cached: Weights, q: Array, gates: Array, grid: Grid
) -> Array:
    """Read the gates' mixture of all weights, mixed layer by layer; gates [b, t, h, n + 1]."""
    assert writes.online is not None
    own, online = to_places(gates[..., -1:], grid), online_apply(writes.online, q.dtype)

    def one_layer(a: Array, weights: Weights) -> Array:
        return product("...oi,...ci->...co", weights[0], a, dtype=a.dtype)

    def apply(layer: int, a: Array) -> Array:
        a = a.astype(q.dtype)
        mixed = _sum_slots(one_layer, from_places(a, grid), gates, (cached[layer],), grid)
        return own * online(layer, a) + to_places(mixed, grid)

    return from_places(memory.read(apply, to_places(q, grid)), grid)


def _sum_slots(read: SlotRead, x: Array, gates: Array, weights: Weights, grid: Grid) -> Array:
    """Sum the cached memories' reads of x [b, t, h, i] by gates [b, t, h, n + 1]: [b, t, h, o]."""
    x, share = x.swapaxes(1, 2), gates[..., :-1].swapaxes(1, 2)
    return sum_over_slots(read, x, share, weights, grid.segment).swapaxes(1, 2)


def _read_online(memory: Memory, writes: Writes, queries: Array) -> Array:
    """Return the online memory's reads [g, b, 1, h, c, v] of queries in their chunks."""
    if writes.online is None:
        assert writes.read is not None
        return writes.read
    return memory.read(online_apply(writes.online, queries.dtype), queries)
