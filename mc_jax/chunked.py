"""The chunked write: a scan over chunks carries the memory; all else is parallel (section 6)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.segmentation import Plan
from mc_jax.backends import ChunkMix, Coefficients, Events, Memory, MemoryState, Weights
from mc_jax.backends.base import Apply
from mc_jax.cache import choose, start_state
from mc_jax.layout import to_chunks
from mc_jax.numerics import KEPT, Array, keep, product, scale_rows, state_dtype


class Writes(NamedTuple):
    """What a chunked write leaves for the reads; every array leads with [g, b, r]."""

    weights: Weights  # the memory as each chunk began [..., h, o, i]
    momentum: Weights
    events: Events
    mix: ChunkMix
    ends: Weights  # the memory at each segment's end [b, n, h, o, i]
    final: MemoryState  # after the last token [b, h, ...]


def write_chunks(
    memory: Memory,
    k: Array,
    v: Array,
    initial: Weights,
    coefficients: Coefficients,
    mask: Array,
    plan: Plan,
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
    """
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    at = jax.tree.map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].astype(at.step.dtype), plan)
    mix = memory.chunk_mix(at, written)
    start = start_state(memory, initial, k[0], v[0])
    previous: Weights = ()
    if memory.reaches_back:
        previous = _tokens_before(k, v, written > 0, plan)
        k, v = (
            jnp.concatenate([p[..., None, :].astype(x.dtype), x], axis=-2)
            for p, x in zip(previous, (k, v), strict=True)
        )
    if memory.is_mlp:
        before, momentum, events, final = _scan_mlp(memory, k, v, mix, start, plan)
    else:
        events = memory.events((), k, v)
        before, final = _scan_matrix(events, mix, start, plan, k.dtype)
        momentum = ()
    anchor = _anchor(memory, before, final, plan)
    if memory.reaches_back:
        final = final._replace(previous=_last_token(k, v, written > 0))
    weights = _restarted(before, start.weights, plan)
    momentum = _restarted(momentum, jax.tree.map(jnp.zeros_like, start.momentum), plan)
    ends = jax.tree.map(lambda b, f: _segment_ends(b, f, plan), before, final.weights)
    last = jax.tree.map(lambda x: x[:, -1], final._replace(anchor=anchor))
    return Writes(weights, momentum, events, mix, ends, last)


def online_apply(writes: Writes, dtype: jnp.dtype) -> Apply:
    """Return the online memory's linear maps for tokens [g, b, r, h, c, i]: the dual form.

    `z_t = P_t (W_0 a_t) + Q_t (S_0 a_t) - Σ_{i<=t} C[t, i] <a_t, a_i> δ_i`.
    """
    mix, events = writes.mix, writes.events

    def apply(layer: int, a: Array) -> Array:
        # Scaled before the product, so that the scale's gradient needs no product again.
        z = product(
            "...oi,...ci->...co", writes.weights[layer], scale_rows(mix.state, a), dtype=dtype
        )
        if mix.momentum is not None:
            scaled = scale_rows(mix.momentum, a)
            z += product("...oi,...ci->...co", writes.momentum[layer], scaled, dtype=dtype)
        match = product("...ci,...ei->...ce", a, events.inputs[layer], dtype=dtype)
        written = product(
            "...ce,...eo->...co", match * mix.events, events.deltas[layer], dtype=dtype
        )
        return keep(z - written)

    return apply


def _scan_mlp(
    memory: Memory, k: Array, v: Array, mix: ChunkMix, start: MemoryState, plan: Plan
) -> tuple[Weights, Weights, Events, MemoryState]:
    @partial(jax.checkpoint, prevent_cse=False, policy=KEPT)
    def write(weights: Weights, momentum: Weights, k: Array, v: Array, mix: ChunkMix):  # type: ignore[no-untyped-def]
        events = memory.events(weights, k, v)
        add = _outer(events, mix.events[..., -1, :], k.dtype)
        new = tuple(
            mix.state[..., -1, None, None] * w - g for w, g in zip(weights, add, strict=True)
        )
        if mix.momentum is None or mix.momentum_add is None or mix.momentum_keep is None:
            return new, momentum, events
        new = tuple(
            w + mix.momentum[..., -1, None, None] * s for w, s in zip(new, momentum, strict=True)
        )
        add = _outer(events, mix.momentum_add, k.dtype)
        momentum = tuple(
            mix.momentum_keep[..., None, None] * s - g for s, g in zip(momentum, add, strict=True)
        )
        return new, momentum, events

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        k, v, mix, restart = chunk
        state = choose(restart, start, carry) if _restarts_inside(plan) else carry
        weights, momentum, events = write(state.weights, state.momentum, k, v, mix)
        after = state._replace(weights=weights, momentum=momentum)
        return after, (carry.weights, carry.momentum, events)

    chunks = (k, v, mix, jnp.asarray(plan.restarts.T)[:, None])
    final, (before, momentum, events) = jax.lax.scan(step, start, chunks)
    return before, momentum, events, final


def _scan_matrix(
    events: Events, mix: ChunkMix, start: MemoryState, plan: Plan, dtype: jnp.dtype
) -> tuple[Weights, MemoryState]:
    # No gradient depends on the memory: all products are taken at once, the scan only adds.
    (add,) = _outer(events, mix.events[..., -1, :], dtype)
    keep = mix.state[..., -1, None, None]

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        keep, add, restart = chunk
        state = choose(restart, start, carry) if _restarts_inside(plan) else carry
        after = state._replace(weights=(keep * state.weights[0] - add,))
        return after, carry.weights

    final, before = jax.lax.scan(step, start, (keep, add, jnp.asarray(plan.restarts.T)[:, None]))
    return before, final


def _outer(events: Events, scale: Array, dtype: jnp.dtype) -> Weights:
    """Return `Σ_i scale_i δ_i a_iᵀ` of each layer; `scale` is [..., h, e]."""
    return tuple(
        product("...eo,...ei->...oi", scale_rows(scale, delta), a, dtype=dtype)
        for a, delta in zip(events.inputs, events.deltas, strict=True)
    )


def _restarts_inside(plan: Plan) -> bool:
    return bool(plan.restarts[:, 1:].any())


def _restarted(before: Weights, start: Weights, plan: Plan) -> Weights:
    """Replace the carried memory by the initial one where a chunk restarts inside a row."""
    if not _restarts_inside(plan):
        return before
    restart = plan.restarts.T[:, None, :, None, None, None]
    return tuple(jnp.where(restart, s[None], b) for b, s in zip(before, start, strict=True))


def _segment_ends(before: Array, final: Array, plan: Plan) -> Array:
    """Gather [b, n, h, ...] from what chunks began with [g, b, r, ...] and the final states."""
    if plan.rows > 1:
        return final
    following = before[plan.last_chunk[:-1] + 1, :, 0]
    return jnp.concatenate([jnp.moveaxis(following, 0, 1), final], axis=1)


def _anchor(memory: Memory, before: Weights, final: MemoryState, plan: Plan) -> Weights:
    """Return the weights [b, r, ...] with which the last token's chunk began."""
    if not memory.is_mlp:
        return ()
    last = int(plan.last_chunk[-1]) % plan.restarts.shape[1]
    return final.anchor if plan.restarts[-1, last] else tuple(b[last] for b in before)


def _tokens_before(k: Array, v: Array, written: Array, plan: Plan) -> Weights:
    """Return k and v [g, b, r, h, ...] of the last real token before each chunk; zeros if none."""
    g, b, r, _, c = written.shape
    place = np.arange(g * c).reshape(g, 1, 1, c)
    seen = jnp.where(written[:, :, :, 0], place + 1, 0)
    seen = jax.lax.cummax(seen.transpose(1, 2, 0, 3).reshape(b, r, g * c), axis=2)
    # 1 + the place of the last real token before each chunk; 0 is none.
    latest = jnp.concatenate([jnp.zeros_like(seen[..., :1]), seen[..., c - 1 : -1 : c]], axis=-1)
    opening = np.maximum.accumulate(np.where(plan.restarts, np.arange(g), 0), axis=1) * c
    latest = jnp.where(latest > opening[None], latest, 0)

    def gather(x: Array) -> Array:
        flat = x.transpose(1, 2, 0, 4, 3, 5).reshape(b, r, g * c, x.shape[3], x.shape[5])
        found = jnp.take_along_axis(flat, jnp.maximum(latest - 1, 0)[..., None, None], axis=2)
        found = jnp.where((latest > 0)[..., None, None], found, jnp.zeros_like(found))
        return found.transpose(2, 0, 1, 3, 4)

    return gather(k), gather(v)


def _last_token(k: Array, v: Array, written: Array) -> Weights:
    """Return k and v [b, r, h, ...] of the last real token; the chunks lead with the one before."""
    written, k, v = written[-1], k[-1], v[-1]
    number = np.arange(1, written.shape[-1] + 1)
    last = jnp.max(jnp.where(written, number, 0), axis=-1)[..., None, None]
    return tuple(
        jnp.take_along_axis(x, last, axis=-2)[..., 0, :].astype(state_dtype(x.dtype))
        for x in (k, v)
    )
