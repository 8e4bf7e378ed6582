"""The chunked write: a scan over chunks carries the memory; all else is parallel (section 6).

The online memory of an MLP is read on the way, unless a soup or an inspection asks for it later.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.segmentation import Plan
from mc_jax.backends import ChunkMix, Coefficients, Events, Memory, MemoryState, Weights
from mc_jax.backends.base import Apply
from mc_jax.cache import choose, start_state
from mc_jax.layout import to_chunks
from mc_jax.numerics import KEPT, Array, keep, product, scale_rows


class Chunks(NamedTuple):
    """Tokens in rows of chunks, as a write takes them."""

    k: Array  # keys [g, b, r, h, c, k], zero where nothing is written
    v: Array  # values [g, b, r, h, c, v], likewise
    at: Coefficients  # each [g, b, r, h, c]
    written: Array  # 1 at real tokens, else 0 [g, b, r, 1, c]
    # Queries [g, b, r, h, c, k] that read their own memory on the way, MLP memories alone; None =
    # they come later, by `online_apply`.
    q: Array | None = None
    # bool [g, b or 1, r], True where a chunk begins at the initial state; None = nowhere.
    restarts: Array | None = None
    # bool [g, b, r], True where a chunk begins with its first token: its gradients are taken at the
    # memory as it is then, elsewhere at `state.anchor`, for what is here is the rest of a chunk.
    # None = everywhere.
    opens: Array | None = None


class Online(NamedTuple):
    """The online memory of every token of chunks, as reads take it; arrays lead with [g, b, r]."""

    weights: Weights  # the memory as each chunk began [..., h, o, i]
    momentum: Weights
    events: Events
    mix: ChunkMix


class Writes(NamedTuple):
    """What a chunked write leaves for the reads."""

    online: Online | None  # None where it has been read on the way
    read: Array | None  # what it gave then [g, b, r, h, c, v]
    ends: Weights  # the memory at each segment's end [b, n, h, o, i]
    final: MemoryState  # after the last token [b, h, ...]


class ChunkWrite(NamedTuple):
    """The memory after a chunk [b, r, h, ...], and what the reads take from the chunk."""

    weights: Weights
    momentum: Weights
    events: Events | None  # None where the queries were read
    read: Array | None  # of the queries [b, r, h, c, v]


class Scanned(NamedTuple):
    """What a scan over chunks carried; arrays lead with [g, b, r], the final state with [b, r]."""

    before: Weights  # the memory that came to each chunk, before any restart [..., h, o, i]
    momentum: Weights
    events: Events | None
    mix: ChunkMix
    final: MemoryState
    read: Array | None = None  # of the queries that came along [..., h, c, v]; else None


def write_chunks(
    memory: Memory,
    k: Array,
    v: Array,
    initial: Weights,
    coefficients: Coefficients,
    mask: Array,
    plan: Plan,
    *,
    q: Array | None = None,
) -> Writes:
    """Write all tokens, chunk by chunk.

    Args:
        memory: the memory kind.
        k: keys [b, t, h, k], zero at masked tokens.
        v: values [b, t, h, v], zero at masked tokens.
        initial: W_0, first layer first, each [h, o, i].
        coefficients: each [b, t, h].
        mask: [b, t] bool, True = a real token.
        plan: segments and chunks.
        q: queries [b, t, h, k] that read the online memory on the way, as `Chunks` has them.
    """
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    at = jax.tree.map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].astype(at.step.dtype), plan)
    queries = None if q is None else to_chunks(q, plan)
    restarts = jnp.asarray(plan.restarts.T)[:, None] if plan.restarts[:, 1:].any() else None
    start = start_state(memory, initial, k[0], v[0])
    scanned = scan_chunks(memory, Chunks(k, v, at, written, queries, restarts), start, start)
    final = scanned.final._replace(anchor=_anchor(memory, scanned, plan))
    return Writes(
        online=online_memory(scanned, start, restarts),
        read=scanned.read,
        ends=jax.tree.map(
            lambda b, f: _segment_ends(b, f, plan), scanned.before, scanned.final.weights
        ),
        final=jax.tree.map(lambda x: x[:, -1], final),
    )


def scan_chunks(memory: Memory, chunks: Chunks, state: MemoryState, start: MemoryState) -> Scanned:
    """Write rows of chunks one after another.

    A chunk's write and the read of its own queries work on the same few arrays. Together they stay
    in a cache, and neither the momentum nor the events of a chunk outlive it.

    Args:
        memory: the memory kind.
        chunks: [g, b, r, ...].
        state: the memory before the first chunk [b, r, h, ...].
        start: the state before a stream's first token [b, r, h, ...].
    """
    k, v, restarts = chunks.k, chunks.v, chunks.restarts
    mix = memory.chunk_mix(chunks.at, chunks.written)
    previous: Weights = ()
    if memory.config.uses_previous_token:
        before, previous = _tokens_before(chunks, state.previous)
        k, v = (
            jnp.concatenate([p[..., None, :].astype(x.dtype), x], axis=-2)
            for p, x in zip(before, (k, v), strict=True)
        )
    if memory.config.gradient_uses_weights:
        return _scan_with_weights(memory, chunks._replace(k=k, v=v), mix, state, start)
    events = memory.events((), k, v)
    carried, final = _scan_sums(events, mix, state, start, restarts, k.dtype)
    return Scanned(carried, (), events, mix, final._replace(previous=previous))


def online_memory(scanned: Scanned, start: MemoryState, restarts: Array | None) -> Online | None:
    """Return the online memory of chunks [g, b, r, ...]; None where the scan has read it."""
    events = scanned.events
    if events is None:
        return None
    if restarts is None:
        return Online(scanned.before, scanned.momentum, events, scanned.mix)
    condition = restarts[..., None, None, None]

    def pick(start: Weights, before: Weights) -> Weights:
        return tuple(jnp.where(condition, s, b) for s, b in zip(start, before, strict=True))

    weights, momentum = pick(start.weights, scanned.before), pick(start.momentum, scanned.momentum)
    return Online(weights, momentum, events, scanned.mix)


def online_apply(online: Online, dtype: jnp.dtype) -> Apply:
    """Return the online memory's linear maps for tokens [g, b, r, h, c, i]: the dual form.

    `z_t = P_t (W_0 a_t) + Q_t (S_0 a_t) - Σ_{i<=t} C[t, i] <a_t, a_i> δ_i`.
    """
    mix, events = online.mix, online.events

    def apply(layer: int, a: Array) -> Array:
        # Scaled before the product, so that the scale's gradient needs no product again.
        z = product(
            "...oi,...ci->...co", online.weights[layer], scale_rows(mix.state, a), dtype=dtype
        )
        if mix.momentum is not None:
            scaled = scale_rows(mix.momentum, a)
            z += product("...oi,...ci->...co", online.momentum[layer], scaled, dtype=dtype)
        match = product("...ci,...ei->...ce", a, events.inputs[layer], dtype=dtype)
        written = product(
            "...ce,...eo->...co", match * mix.events, events.deltas[layer], dtype=dtype
        )
        return keep(z - written)

    return apply


def write_chunk(
    memory: Memory, state: MemoryState, k: Array, v: Array, q: Array | None, mix: ChunkMix
) -> ChunkWrite:
    """Write the tokens of one chunk, whose gradients are all taken at one memory (section 6).

    1. Take every token's gradient `G_i = δ_i a_iᵀ` at `state.anchor`.
    2. Read the queries, each from the memory after its own token, in the dual form.
    3. Write: `W_c = P_c W_0 + Q_c S_0 - Σ_i C[c, i] G_i`, c being the last token.
    4. Carry the momentum: `S_c = keep S_0 - Σ_i add_i G_i`.

    Args:
        memory: the memory kind.
        state: the memory before the chunk [b, r, h, ...]; its `anchor` is not empty.
        k: keys [b, r, h, c, k], zero where nothing is written.
        v: values [b, r, h, c, v], likewise.
        q: queries [b, r, h, c, k], or None: the online memory is read later.
        mix: the chunk's coefficients.
    """
    events = memory.events(state.anchor, k, v)  # 1

    read = None  # 2
    if q is not None:
        online = Online(state.weights, state.momentum, events, mix)
        read = memory.read(online_apply(online, k.dtype), q)

    written = _outer(events, mix.events[..., -1, :], k.dtype)  # 3
    kept = mix.state[..., -1, None, None]
    weights = tuple(kept * w - g for w, g in zip(state.weights, written, strict=True))
    momentum = state.momentum
    if mix.momentum is not None:
        carried = mix.momentum[..., -1, None, None]
        weights = tuple(w + carried * s for w, s in zip(weights, momentum, strict=True))

        assert mix.momentum_add is not None  # 4
        assert mix.momentum_keep is not None
        added = _outer(events, mix.momentum_add, k.dtype)
        kept = mix.momentum_keep[..., None, None]
        momentum = tuple(kept * s - g for s, g in zip(momentum, added, strict=True))

    return ChunkWrite(weights, momentum, events if q is None else None, read)


def _scan_with_weights(
    memory: Memory, chunks: Chunks, mix: ChunkMix, state: MemoryState, start: MemoryState
) -> Scanned:
    k, v, _, _, q, restarts, opens = chunks

    @partial(jax.checkpoint, prevent_cse=False, policy=KEPT)
    def write(*chunk: Any) -> ChunkWrite:
        return write_chunk(memory, *chunk)

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        k, v, q, mix, restart, opening = chunk
        state = carry if restart is None else choose(restart, start, carry)
        anchor = state.weights
        if opening is not None:
            anchor = choose(opening, state.weights, state.anchor)
        state = state._replace(anchor=anchor)
        new = write(state, k, v, q, mix)
        after = state._replace(weights=new.weights, momentum=new.momentum)
        if opening is None:
            after = after._replace(anchor=carry.anchor)
        before = carry.weights, () if q is not None else carry.momentum
        return after, (*before, new.events, new.read)

    each = (k, v, q, mix, restarts, opens)
    final, (before, momentum, events, read) = jax.lax.scan(step, state, each)
    return Scanned(before, momentum, events, mix, final, read)


def _scan_sums(
    events: Events,
    mix: ChunkMix,
    state: MemoryState,
    start: MemoryState,
    restarts: Array | None,
    dtype: jnp.dtype,
) -> tuple[Weights, MemoryState]:
    # No gradient depends on the memory: all products are taken at once, the scan only adds.
    (add,) = _outer(events, mix.events[..., -1, :], dtype)
    keep = mix.state[..., -1, None, None]

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        keep, add, restart = chunk
        state = carry if restart is None else choose(restart, start, carry)
        after = state._replace(weights=(keep * state.weights[0] - add,))
        return after, carry.weights

    final, before = jax.lax.scan(step, state, (keep, add, restarts))
    return before, final


def _outer(events: Events, scale: Array, dtype: jnp.dtype) -> Weights:
    """Return `Σ_i scale_i δ_i a_iᵀ` of each layer; `scale` is [..., h, e]."""

    def one(a: Array, delta: Array) -> Array:
        scaled = scale_rows(scale, delta)
        # The wider factor goes last: XLA's CPU takes half as long for it.
        if delta.shape[-1] > a.shape[-1]:
            return product("...eo,...ei->...io", scaled, a, dtype=dtype).swapaxes(-1, -2)
        return product("...eo,...ei->...oi", scaled, a, dtype=dtype)

    return tuple(map(one, events.inputs, events.deltas))


def _segment_ends(before: Array, final: Array, plan: Plan) -> Array:
    """Gather [b, n, h, ...] from what chunks began with [g, b, r, ...] and the final states."""
    if plan.rows > 1:
        return final
    following = before[plan.last_chunk[:-1] + 1, :, 0]
    return jnp.concatenate([jnp.moveaxis(following, 0, 1), final], axis=1)


def _anchor(memory: Memory, scanned: Scanned, plan: Plan) -> Weights:
    """Return the weights [b, r, ...] with which the last token's chunk began."""
    if not memory.config.gradient_uses_weights:
        return ()
    last = int(plan.last_chunk[-1]) % plan.restarts.shape[1]
    # No chunk changed the anchor of the state that the scan began with: the initial memory.
    return (
        scanned.final.anchor if plan.restarts[-1, last] else tuple(b[last] for b in scanned.before)
    )


def _tokens_before(chunks: Chunks, previous: Weights) -> tuple[Weights, Weights]:
    """Return k and v of the last real token before each chunk [g, b, r, h, ...], and of the last.

    They are zero where there is none since the last restart.
    """
    k, v, written, restarts = chunks.k, chunks.v, chunks.written > 0, chunks.restarts
    number = np.arange(1, written.shape[-1] + 1)
    last = jnp.max(jnp.where(written, number, 0), axis=-1)[..., None, None]  # 0 is none

    def step(carry: Weights, chunk):  # type: ignore[no-untyped-def]
        k, v, last, restart = chunk
        if restart is not None:
            carry = choose(restart, jax.tree.map(jnp.zeros_like, carry), carry)
        tokens = (
            jnp.concatenate([old[..., None, :], x.astype(old.dtype)], axis=-2)
            for old, x in zip(carry, (k, v), strict=True)
        )
        after = tuple(jnp.take_along_axis(x, last, axis=-2)[..., 0, :] for x in tokens)
        return after, carry

    after, before = jax.lax.scan(step, previous, (k, v, last, restarts))
    return before, after
