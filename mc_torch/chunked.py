"""The chunked write: a loop over chunks carries the memory; all else is parallel (section 6).

The online memory of an MLP is read on the way, unless a soup or an inspection asks for it later.
"""

from typing import Any, NamedTuple

import torch

from mc_torch.backends import ChunkMix, Coefficients, Events, Memory, MemoryState, Weights
from mc_torch.backends.base import Apply
from mc_torch.cache import choose, start_state
from mc_torch.layout import TensorPlan, to_chunks
from mc_torch.numerics import Array, product, remat, scale_rows, tree_map, unstack

# bool [g, b or 1, r], or [g] where all rows do the same and the host knows; None = nowhere.
_Restarts = Array | tuple[bool, ...] | None


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
    restarts: _Restarts = None
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
    """What a loop over chunks carried; arrays lead with [g, b, r], the final state with [b, r]."""

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
    plan: TensorPlan,
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
    at = tree_map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].to(at.step.dtype), plan)
    queries = None if q is None else to_chunks(q, plan)
    restarts = plan.restarts if any(plan.restarts[1:]) else None
    start = start_state(memory, initial, k[0], v[0])
    scanned = scan_chunks(memory, Chunks(k, v, at, written, queries, restarts), start, start)
    final = scanned.final._replace(anchor=_anchor(memory, scanned, plan))
    return Writes(
        online=online_memory(scanned, start, restarts),
        read=scanned.read,
        ends=tree_map(
            lambda b, f: _segment_ends(b, f, plan), scanned.before, scanned.final.weights
        ),
        final=tree_map(lambda x: x[:, -1], final),
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
            torch.cat([p[..., None, :].to(x.dtype), x], dim=-2)
            for p, x in zip(before, (k, v), strict=True)
        )
    if memory.config.gradient_uses_weights:
        return _loop_with_weights(memory, chunks._replace(k=k, v=v), mix, state, start)
    events = memory.events((), k, v)
    carried, final = _loop_sums(events, mix, state, start, restarts, k.dtype)
    return Scanned(carried, (), events, mix, final._replace(previous=previous))


def online_memory(scanned: Scanned, start: MemoryState, restarts: _Restarts) -> Online | None:
    """Return the online memory of chunks [g, b, r, ...]; None where the scan has read it."""
    events = scanned.events
    if events is None:
        return None
    if restarts is None:
        return Online(scanned.before, scanned.momentum, events, scanned.mix)
    condition = _as_tensor(restarts, scanned.before[0])[..., None, None, None]

    def pick(start: Weights, before: Weights) -> Weights:
        return tuple(torch.where(condition, s, b) for s, b in zip(start, before, strict=True))

    weights, momentum = pick(start.weights, scanned.before), pick(start.momentum, scanned.momentum)
    return Online(weights, momentum, events, scanned.mix)


def online_apply(online: Online, dtype: torch.dtype) -> Apply:
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
            z = z + product("...oi,...ci->...co", online.momentum[layer], scaled, dtype=dtype)
        match = product("...ci,...ei->...ce", a, events.inputs[layer], dtype=dtype)
        return z - product(
            "...ce,...eo->...co", match * mix.events, events.deltas[layer], dtype=dtype
        )

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


def _loop_with_weights(
    memory: Memory, chunks: Chunks, mix: ChunkMix, state: MemoryState, start: MemoryState
) -> Scanned:
    k, v, _, _, q, restarts, opens = chunks

    def write(*chunk: Any) -> ChunkWrite:
        return write_chunk(memory, *chunk)

    done, number = [], k.shape[0]
    each = zip(
        unstack((k, v, mix)),
        (None,) * number if q is None else q.unbind(0),
        _each(restarts, number),
        _each(opens, number),
        strict=True,
    )
    for (keys, values, weights), queries, restart, opening in each:
        before = state.weights, () if q is not None else state.momentum
        state = _restarted(restart, start, state)
        anchor = state.weights
        if opening is not None:
            anchor = choose(opening, state.weights, state.anchor)
            state = state._replace(anchor=anchor)
        new = remat(write)(state._replace(anchor=anchor), keys, values, queries, weights)
        state = state._replace(weights=new.weights, momentum=new.momentum)
        done.append((*before, new.events, new.read))
    carried, momentum, events, read = _stack(done)
    return Scanned(carried, momentum, events, mix, state, read)


def _loop_sums(
    events: Events,
    mix: ChunkMix,
    state: MemoryState,
    start: MemoryState,
    restarts: _Restarts,
    dtype: torch.dtype,
) -> tuple[Weights, MemoryState]:
    # No gradient depends on the memory: all products are taken at once, the loop only adds.
    (add,) = _outer(events, mix.events[..., -1, :], dtype)
    keep = mix.state[..., -1, None, None]
    carried = []
    for kept, added, restart in zip(
        keep.unbind(0), add.unbind(0), _each(restarts, len(add)), strict=True
    ):
        carried.append(state.weights)
        state = _restarted(restart, start, state)
        state = state._replace(weights=(kept * state.weights[0] - added,))
    return _stack(carried), state


def _outer(events: Events, scale: Array, dtype: torch.dtype) -> Weights:
    """Return `Σ_i scale_i δ_i a_iᵀ` of each layer; `scale` is [..., h, e]."""

    def one(a: Array, delta: Array) -> Array:
        scaled = scale_rows(scale, delta)
        # The wider factor goes last: XLA's CPU takes half as long for it.
        if delta.shape[-1] > a.shape[-1]:
            return product("...eo,...ei->...io", scaled, a, dtype=dtype).transpose(-1, -2)
        return product("...eo,...ei->...oi", scaled, a, dtype=dtype)

    return tuple(map(one, events.inputs, events.deltas))


def _stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _each(flags: _Restarts, chunks: int) -> Any:
    """Return the flags of every chunk."""
    if flags is None:
        return (None,) * chunks
    return flags if isinstance(flags, tuple) else flags.unbind(0)


def _restarted(restart: Any, start: MemoryState, state: MemoryState) -> MemoryState:
    """Return the state with which a chunk begins."""
    if restart is None or isinstance(restart, bool):
        return start if restart else state
    return choose(restart, start, state)


def _as_tensor(restarts: Array | tuple[bool, ...], like: Array) -> Array:
    """Return bool [g, b or 1, r]."""
    if isinstance(restarts, tuple):
        return torch.tensor(restarts, device=like.device)[:, None, None]
    return restarts


def _segment_ends(before: Array, final: Array, plan: TensorPlan) -> Array:
    """Gather [b, n, h, ...] from what chunks began with [g, b, r, ...] and the final states."""
    if plan.rows > 1:
        return final
    chunks = before.unbind(0)
    return torch.cat([*(chunks[last + 1] for last in plan.last_chunk[:-1]), final], dim=1)


def _anchor(memory: Memory, scanned: Scanned, plan: TensorPlan) -> Weights:
    """Return the weights [b, r, ...] with which the last token's chunk began."""
    if not memory.config.gradient_uses_weights:
        return ()
    last = plan.last_chunk[-1] % len(plan.restarts)
    # No chunk changed the anchor of the state that the loop began with: the initial memory.
    return scanned.final.anchor if plan.restarts[last] else tuple(b[last] for b in scanned.before)


def _tokens_before(chunks: Chunks, previous: Weights) -> tuple[Weights, Weights]:
    """Return k and v of the last real token before each chunk [g, b, r, h, ...], and of the last.

    They are zero where there is none since the last restart.
    """
    k, v, written, restarts = chunks.k, chunks.v, chunks.written > 0, chunks.restarts
    g, b, r, _, c = written.shape
    number = torch.arange(1, g * c + 1, device=k.device).reshape(g, 1, 1, c)
    # The number of the last real token before each chunk, and before the end; 0 is none.
    latest = torch.where(written[:, :, :, 0], number, 0).amax(dim=-1).cummax(dim=0).values
    latest = torch.cat([torch.zeros_like(latest[:1]), latest])
    # How many tokens came before the last restart.
    begin = torch.full_like(latest, -1)
    if restarts is not None:
        first = torch.where(_as_tensor(restarts, k), number[..., 0] - 1, -1)
        first = first.cummax(dim=0).values.expand(g, b, r)
        begin = torch.cat([first, first[-1:]])
    found = (latest > begin.clamp(min=0))[..., None, None]
    carried = (begin < 0)[..., None, None]

    def gather(x: Array, old: Array) -> Array:
        h, width = x.shape[3], x.shape[5]
        flat = x.permute(1, 2, 0, 4, 3, 5).reshape(b, r, g * c, h, width)
        index = (latest - 1).clamp(min=0).permute(1, 2, 0)[..., None, None]
        taken = torch.gather(flat, 2, index.expand(b, r, g + 1, h, width))
        taken = taken.permute(2, 0, 1, 3, 4).to(old.dtype)
        return torch.where(found, taken, torch.where(carried, old, torch.zeros_like(old)))

    tokens = tuple(gather(x, old) for x, old in zip((k, v), previous, strict=True))
    return tuple(x[:-1] for x in tokens), tuple(x[-1] for x in tokens)
