"""The chunked write: a loop over chunks carries the memory; all else is parallel (section 6)."""

from typing import NamedTuple

import torch

from mc_torch.backends import ChunkMix, Coefficients, Events, Memory, MemoryState, Weights
from mc_torch.backends.base import Apply
from mc_torch.cache import start_state
from mc_torch.layout import Plan, to_chunks
from mc_torch.numerics import Array, product, remat, scale_rows, state_dtype, tree_map, unstack


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
    at = tree_map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].to(at.step.dtype), plan)
    mix = memory.chunk_mix(at, written)
    start = start_state(memory, initial, k[0], v[0])
    if memory.reaches_back:
        previous = _tokens_before(k, v, written > 0, plan)
        k, v = (
            torch.cat([p[..., None, :].to(x.dtype), x], dim=-2)
            for p, x in zip(previous, (k, v), strict=True)
        )
    if memory.is_mlp:
        before, after, events = _loop_mlp(memory, k, v, mix, start, plan)
    else:
        events = memory.events((), k, v)
        before, after = _loop_matrix(events, mix, start, plan, k.dtype)
    final = after[-1]
    if memory.is_mlp:
        last = plan.last_chunk[-1] % len(before)
        final = final._replace(anchor=before[last].weights)
    if memory.reaches_back:
        final = final._replace(previous=_last_token(k, v, written > 0))
    return Writes(
        weights=_stack([state.weights for state in before]),
        momentum=_stack([state.momentum for state in before]),
        events=events,
        mix=mix,
        ends=_segment_ends([state.weights for state in after], plan),
        final=tree_map(lambda x: x[:, -1], final),
    )


def online_apply(writes: Writes, dtype: torch.dtype) -> Apply:
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
            z = z + product("...oi,...ci->...co", writes.momentum[layer], scaled, dtype=dtype)
        match = product("...ci,...ei->...ce", a, events.inputs[layer], dtype=dtype)
        return z - product(
            "...ce,...eo->...co", match * mix.events, events.deltas[layer], dtype=dtype
        )

    return apply


def _loop_mlp(
    memory: Memory, k: Array, v: Array, mix: ChunkMix, start: MemoryState, plan: Plan
) -> tuple[list[MemoryState], list[MemoryState], Events]:
    """Return the states before and after each chunk, and the events of all."""
    state, before, after, events = start, [], [], []
    for restart, chunk in zip(plan.restarts, unstack((k, v, mix)), strict=True):
        state = start if restart else state
        before.append(state)
        state, written = remat(_write_chunk)(memory, state, *chunk)
        after.append(state)
        events.append(written)
    return before, after, _stack(events)


def _write_chunk(
    memory: Memory, state: MemoryState, k: Array, v: Array, mix: ChunkMix
) -> tuple[MemoryState, Events]:
    events = memory.events(state.weights, k, v)
    add = _outer(events, mix.events[..., -1, :], k.dtype)
    weights = tuple(
        mix.state[..., -1, None, None] * w - g for w, g in zip(state.weights, add, strict=True)
    )
    if mix.momentum is None or mix.momentum_add is None or mix.momentum_keep is None:
        return state._replace(weights=weights), events
    weights = tuple(
        w + mix.momentum[..., -1, None, None] * s
        for w, s in zip(weights, state.momentum, strict=True)
    )
    add = _outer(events, mix.momentum_add, k.dtype)
    momentum = tuple(
        mix.momentum_keep[..., None, None] * s - g for s, g in zip(state.momentum, add, strict=True)
    )
    return state._replace(weights=weights, momentum=momentum), events


def _loop_matrix(
    events: Events, mix: ChunkMix, start: MemoryState, plan: Plan, dtype: torch.dtype
) -> tuple[list[MemoryState], list[MemoryState]]:
    """Return the states before and after each chunk."""
    # No gradient depends on the memory: all products are taken at once, the loop only adds.
    (add,) = _outer(events, mix.events[..., -1, :], dtype)
    keep = mix.state[..., -1, None, None]
    state, before, after = start, [], []
    for restart, kept, added in zip(plan.restarts, keep.unbind(0), add.unbind(0), strict=True):
        state = start if restart else state
        before.append(state)
        state = state._replace(weights=(kept * state.weights[0] - added,))
        after.append(state)
    return before, after


def _outer(events: Events, scale: Array, dtype: torch.dtype) -> Weights:
    """Return `Σ_i scale_i δ_i a_iᵀ` of each layer; `scale` is [..., h, e]."""
    return tuple(
        product("...eo,...ei->...oi", scale_rows(scale, delta), a, dtype=dtype)
        for a, delta in zip(events.inputs, events.deltas, strict=True)
    )


def _stack(trees):  # type: ignore[no-untyped-def]
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _segment_ends(after: list[Weights], plan: Plan) -> Weights:
    """Gather [b, n, h, ...] from the states after each chunk [b, r, h, ...]."""
    if plan.rows > 1:
        return after[-1]
    ends = [after[chunk] for chunk in plan.last_chunk]
    return tree_map(lambda *leaves: torch.cat(leaves, dim=1), *ends)


def _tokens_before(k: Array, v: Array, written: Array, plan: Plan) -> Weights:
    """Return k and v [g, b, r, h, ...] of the last real token before each chunk; zeros if none."""
    g, b, r, _, c = written.shape
    place = torch.arange(g * c, device=k.device).reshape(g, 1, 1, c)
    seen = torch.where(written[:, :, :, 0], place + 1, 0)
    seen = torch.cummax(seen.permute(1, 2, 0, 3).reshape(b, r, g * c), dim=2).values
    # 1 + the place of the last real token before each chunk; 0 is none.
    latest = torch.cat([torch.zeros_like(seen[..., :1]), seen[..., c - 1 : -1 : c]], dim=-1)
    latest = torch.where(latest > plan.opening * c, latest, 0)

    def gather(x: Array) -> Array:
        h, width = x.shape[3], x.shape[5]
        flat = x.permute(1, 2, 0, 4, 3, 5).reshape(b, r, g * c, h, width)
        index = (latest - 1).clamp(min=0)[..., None, None].expand(b, r, g, h, width)
        found = torch.gather(flat, 2, index)
        found = torch.where((latest > 0)[..., None, None], found, torch.zeros_like(found))
        return found.permute(2, 0, 1, 3, 4)

    return gather(k), gather(v)


def _last_token(k: Array, v: Array, written: Array) -> Weights:
    """Return k and v [b, r, h, ...] of the last real token; the chunks lead with the one before."""
    written, k, v = written[-1], k[-1], v[-1]
    number = torch.arange(1, written.shape[-1] + 1, device=k.device)
    last = torch.where(written, number, 0).amax(dim=-1)[..., None, None]

    def take(x: Array) -> Array:
        index = last.expand(*x.shape[:-2], 1, x.shape[-1])
        return torch.gather(x, -2, index)[..., 0, :].to(state_dtype(x.dtype))

    return take(k), take(v)
