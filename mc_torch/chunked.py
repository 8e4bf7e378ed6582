"""Chunked write: a loop over chunks carries the memory, all other work is parallel (section 6).

The online memory of an MLP is read during the scan, except under `soup` and for inspection.
"""

from typing import Any, NamedTuple

import torch

from mc_torch.backends import ChunkDecay, Coefficients, Memory, MemoryState, RankOneUpdates, Weights
from mc_torch.backends.base import Apply, mask_coefficients, sum_updates
from mc_torch.cache import is_traced, start_state, tree_where
from mc_torch.chunk_layout import TensorPlan, to_chunks
from mc_torch.delta_rule import ErrorMaps, chunk_errors, solve_chunks
from mc_torch.numerics import Array, einsum_f32, remat, scale_rows, tree_map, unstack

# bool [g, b or 1, r], or a tuple [g] of Python bools if equal for all rows; None = no restarts.
_Restarts = Array | tuple[bool, ...] | None


class Chunks(NamedTuple):
    """Inputs of a chunked write: tokens in r rows of g chunks."""

    k: Array  # keys [g, b, r, h, c, k], zero at masked tokens and padding
    v: Array  # values [g, b, r, h, c, v], likewise
    coefficients: Coefficients  # each [g, b, r, h, c]
    write_mask: Array  # 1 at unmasked tokens, else 0 [g, b, r, 1, c]
    # Queries [g, b, r, h, c, k] that read the online memory during the scan (MLP memories only);
    # None = read after the scan, by `online_apply`.
    q: Array | None = None
    # bool [g, b or 1, r], True where a chunk starts from the initial state; None = no restarts.
    restarts: _Restarts = None
    # bool [g, b, r], False where the chunk started in an earlier call, so that its gradients are
    # taken at `state.anchor`; else they are taken at the memory before the chunk. None = all True.
    has_first_token: Array | None = None
    # bool [g, b or 1, r], True where the chunk ends with its last token; None = all True.
    completes_chunk: Array | None = None


class OnlineMemory(NamedTuple):
    """Online memory of every token, in the dual form. Leading axes are [g, b, r]."""

    weights: Weights  # memory before each chunk [..., h, o, i]
    momentum: Weights
    updates: RankOneUpdates
    decay: ChunkDecay
    target: Weights = ()  # `Memory.target`, each [h, o, i]


class WriteResult(NamedTuple):
    """Result of a chunked write."""

    online: OnlineMemory | None  # None if `read` is given
    read: Array | None  # reads of the online memory [g, b, r, h, c, v], if computed in the scan
    ends: Weights  # memory after each segment [b, n, h, o, i]
    final: MemoryState  # after the last token [b, h, ...]


class ChunkResult(NamedTuple):
    """Memory after a chunk [b, r, h, ...], and the inputs of its reads."""

    weights: Weights
    momentum: Weights
    updates: RankOneUpdates | None  # None if `read` is given
    read: Array | None  # reads of the chunk's queries [b, r, h, c, v], if any


class ScanResult(NamedTuple):
    """Result of a loop over chunks. Leading axes are [g, b, r]; of the final state [b, r]."""

    before: Weights  # memory carried into each chunk, before any restart [..., h, o, i]
    momentum: Weights
    updates: RankOneUpdates | None
    decay: ChunkDecay
    final: MemoryState
    read: Array | None = None  # reads of `Chunks.q` [..., h, c, v], if given


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
) -> WriteResult:
    """Write a sequence, chunk by chunk.

    Args:
        memory: the memory kind.
        k: keys [b, t, h, k], zero at masked tokens.
        v: values [b, t, h, v], zero at masked tokens.
        initial: weights W_0 per layer, each [h, o, i].
        coefficients: each [b, t, h].
        mask: [b, t] bool, False at masked tokens.
        plan: segments and chunks.
        q: queries [b, t, h, k] that read the online memory during the scan; see `Chunks`.
    """
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    coefficients = tree_map(lambda x: to_chunks(x, plan), coefficients)
    write_mask = to_chunks(mask[:, :, None].to(coefficients.step.dtype), plan)
    queries = None if q is None else to_chunks(q, plan)
    restarts = plan.restarts if any(plan.restarts[1:]) else None
    start = start_state(memory, initial, k[0], v[0])
    chunks = Chunks(k, v, coefficients, write_mask, queries, restarts, None, plan.complete_chunks)
    scanned = scan_chunks(memory, chunks, start, start)
    final = _add_chunk_start(memory, scanned, plan)
    return WriteResult(
        online=online_memory(memory, scanned, start, restarts),
        read=scanned.read,
        ends=tree_map(
            lambda b, f: _segment_ends(b, f, plan), scanned.before, scanned.final.weights
        ),
        final=tree_map(lambda x: x[:, -1], final),
    )


def scan_chunks(
    memory: Memory, chunks: Chunks, state: MemoryState, start: MemoryState
) -> ScanResult:
    """Write the chunks of each row sequentially.

    Each step writes a chunk and reads its queries. Both use the same arrays, which stay in the CPU
    cache. Momentum and updates of the chunks are not stored.

    Args:
        memory: the memory kind.
        chunks: [g, b, r, ...].
        state: state before the first chunk [b, r, h, ...].
        start: initial state, used at restarts [b, r, h, ...].
    """
    k, v, restarts = chunks.k, chunks.v, chunks.restarts
    decay = memory.chunk_decay(chunks.coefficients, chunks.write_mask)
    previous: Weights = ()
    if memory.config.uses_previous_token:
        before, previous = _previous_tokens(chunks, state.previous)
        k, v = (
            torch.cat([p[..., None, :].to(x.dtype), x], dim=-2)
            for p, x in zip(before, (k, v), strict=True)
        )
    if memory.config.gradient_uses_weights:
        return _loop_with_weights(memory, chunks._replace(k=k, v=v), decay, state, start)
    updates = memory.rank_one_updates((), k, v)
    if memory.config.delta_rule:
        retention = mask_coefficients(chunks.coefficients, chunks.write_mask).retention
        maps = solve_chunks(updates, decay, retention, memory.target, k.dtype)
        return _loop_delta_rule(memory, maps, decay, state, start, restarts, k.dtype)
    carried, final = _loop_sums(memory, updates, decay, state, start, restarts, k.dtype)
    return ScanResult(carried, (), updates, decay, final._replace(previous=previous))


def online_memory(
    memory: Memory, scanned: ScanResult, start: MemoryState, restarts: _Restarts
) -> OnlineMemory | None:
    """Return the online memory of chunks [g, b, r, ...]; None if the scan has read it."""
    updates = scanned.updates
    if updates is None:
        return None
    if restarts is None:
        before, momentum = scanned.before, scanned.momentum
        return OnlineMemory(before, momentum, updates, scanned.decay, memory.target)
    condition = _as_tensor(restarts, scanned.before[0])[..., None, None, None]

    def pick(start: Weights, before: Weights) -> Weights:
        return tuple(torch.where(condition, s, b) for s, b in zip(start, before, strict=True))

    weights, momentum = pick(start.weights, scanned.before), pick(start.momentum, scanned.momentum)
    return OnlineMemory(weights, momentum, updates, scanned.decay, memory.target)


def online_apply(online: OnlineMemory, dtype: torch.dtype) -> Apply:
    """Return the linear maps of the online memory for tokens [g, b, r, h, c, i] (dual form).

    `z_t = P_t (W_0 a_t) + Q_t (S_0 a_t) - Σ_{i<=t} C[t, i] <a_t, a_i> δ_i`. With a target T of the
    retention, `(1 - P_t) (T a_t)` is added.
    """
    decay, updates = online.decay, online.updates

    def apply(layer: int, a: Array) -> Array:
        # Scale the input, not the output: the gradient of the scale then needs no extra product.
        z = einsum_f32(
            "...oi,...ci->...co", online.weights[layer], scale_rows(decay.state, a), dtype=dtype
        )
        if online.target:
            scaled = scale_rows(1 - decay.state, a)
            z = z + einsum_f32("...oi,...ci->...co", online.target[layer], scaled, dtype=dtype)
        if decay.momentum is not None:
            scaled = scale_rows(decay.momentum, a)
            z = z + einsum_f32("...oi,...ci->...co", online.momentum[layer], scaled, dtype=dtype)
        similarity = einsum_f32("...ci,...ei->...ce", a, updates.activations[layer], dtype=dtype)
        return z - einsum_f32(
            "...ce,...eo->...co", similarity * decay.updates, updates.errors[layer], dtype=dtype
        )

    return apply


def write_chunk(
    memory: Memory,
    state: MemoryState,
    k: Array,
    v: Array,
    q: Array | None,
    decay: ChunkDecay,
    completes_chunk: Array | None = None,
) -> ChunkResult:
    """Write the tokens of one chunk; all gradients are taken at the same weights (section 6).

    1. Compute every token's gradient `G_i = δ_i a_iᵀ` at `state.anchor`.
    2. Read each query from the memory after its token, in the dual form.
    3. Update weights and momentum by the sums of the gradients.
    4. At the end of the chunk, call `Memory.end_chunk` if the memory kind has it.

    Args:
        memory: the memory kind.
        state: state before the chunk [b, r, h, ...], with an `anchor`, and with the `retention` up
            to the chunk's last token, if used.
        k: keys [b, r, h, c, k], zero at masked tokens and padding.
        v: values [b, r, h, c, v], likewise.
        q: queries [b, r, h, c, k]; None = read the online memory after the scan.
        decay: the chunk's decay weights.
        completes_chunk: bool [b or 1, r], True if the chunk ends; None = all True.
    """
    updates = memory.rank_one_updates(state.anchor, k, v)  # 1

    read = None  # 2
    if q is not None:
        online = OnlineMemory(state.weights, state.momentum, updates, decay, memory.target)
        read = memory.read(online_apply(online, k.dtype), q)

    after = memory.apply_updates(state, updates, decay, k.dtype)  # 3
    if memory.config.updates_at_chunk_end:  # 4
        after = end_chunks(memory, after, completes_chunk)
    return ChunkResult(after.weights, after.momentum, updates if q is None else None, read)


def end_chunks(memory: Memory, state: MemoryState, completes_chunk: Array | None) -> MemoryState:
    """Apply `Memory.end_chunk` to the states [b, r, ...] whose chunk ends; None = all."""
    if completes_chunk is None:
        return memory.end_chunk(state)
    if completes_chunk.is_cpu and not is_traced(completes_chunk) and not completes_chunk.any():
        return state  # on a GPU, this test would wait for the device
    return tree_where(completes_chunk, memory.end_chunk(state), state)


def _loop_with_weights(
    memory: Memory, chunks: Chunks, decay: ChunkDecay, state: MemoryState, start: MemoryState
) -> ScanResult:
    k, v, _, _, q, restarts, has_first_token, completes_chunk = chunks

    def write(*chunk: Any) -> ChunkResult:
        return write_chunk(memory, *chunk)

    results, number = [], k.shape[0]
    inputs = zip(
        unstack((k, v, decay)),
        (None,) * number if q is None else q.unbind(0),
        _each(restarts, number),
        _each(has_first_token, number),
        _each(completes_chunk, number),
        strict=True,
    )
    for (keys, values, weights), queries, restart, has_first_token, completes in inputs:
        before = state.weights, () if q is not None else state.momentum
        state = _restarted(restart, start, state)
        begin = state.weights, tree_map(torch.ones_like, state.retention)
        if has_first_token is not None:
            begin = tree_where(has_first_token, begin, (state.anchor, state.retention))
        retention = tree_map(weights.state[..., -1].mul, begin[1])
        anchored = state._replace(anchor=begin[0], retention=retention)
        state = anchored if has_first_token is not None else state
        new = remat(write)(anchored, keys, values, queries, weights, completes)
        state = state._replace(weights=new.weights, momentum=new.momentum)
        results.append((*before, new.updates, new.read))
    carried, momentum, updates, read = _stack(results)
    return ScanResult(carried, momentum, updates, decay, state, read)


def _loop_delta_rule(
    memory: Memory,
    maps: ErrorMaps,
    decay: ChunkDecay,
    state: MemoryState,
    start: MemoryState,
    restarts: _Restarts,
    dtype: torch.dtype,
) -> ScanResult:
    results, chunks = [], unstack((maps, decay))
    for (chunk, weights), restart in zip(chunks, _each(restarts, len(chunks)), strict=True):
        before = state.weights, state.momentum
        state = _restarted(restart, start, state)
        errors = chunk_errors(chunk, state, dtype)
        updates = RankOneUpdates((chunk.activations,), (errors,))
        state = memory.apply_updates(state, updates, weights, dtype)
        results.append((*before, errors))
    carried, momentum, errors = _stack(results)
    updates = RankOneUpdates((maps.activations,), (errors,))
    return ScanResult(carried, momentum, updates, decay, state)


def _loop_sums(
    memory: Memory,
    updates: RankOneUpdates,
    decay: ChunkDecay,
    state: MemoryState,
    start: MemoryState,
    restarts: _Restarts,
    dtype: torch.dtype,
) -> tuple[Weights, MemoryState]:
    # No gradient depends on the memory, so all products are batched and the loop only accumulates.
    (add,) = sum_updates(updates, decay.updates[..., -1, :], dtype)
    retention = decay.state[..., -1]
    carried = []
    for factor, added, restart in zip(
        retention.unbind(0), add.unbind(0), _each(restarts, len(add)), strict=True
    ):
        carried.append(state.weights)
        state = _restarted(restart, start, state)
        (retained,) = memory.retain(state.weights, factor)
        state = state._replace(weights=(retained - added,))
    return _stack(carried), state


def _stack(trees: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _each(flags: _Restarts, chunks: int) -> Any:
    """Return one flag per chunk."""
    if flags is None:
        return (None,) * chunks
    return flags if isinstance(flags, tuple) else flags.unbind(0)


def _restarted(restart: Any, start: MemoryState, state: MemoryState) -> MemoryState:
    """Return the state at the start of a chunk."""
    if restart is None or isinstance(restart, bool):
        return start if restart else state
    return tree_where(restart, start, state)


def _as_tensor(restarts: Array | tuple[bool, ...], like: Array) -> Array:
    """Return bool [g, b or 1, r]."""
    if isinstance(restarts, tuple):
        return torch.tensor(restarts, device=like.device)[:, None, None]
    return restarts


def _segment_ends(before: Array, final: Array, plan: TensorPlan) -> Array:
    """Return the memory after each segment [b, n, h, ...] from the memories before chunks."""
    if plan.rows > 1:
        return final
    chunks = before.unbind(0)
    return torch.cat([*(chunks[last + 1] for last in plan.last_chunk[:-1]), final], dim=1)


def _add_chunk_start(memory: Memory, scanned: ScanResult, plan: TensorPlan) -> MemoryState:
    """Return the final state [b, r, ...] with anchor and retention of the last token's chunk."""
    if not memory.config.gradient_uses_weights:
        return scanned.final
    last = plan.last_chunk[-1] % len(plan.restarts)
    # After a restart, the anchor is that of the initial state.
    anchor = scanned.final.anchor if plan.restarts[last] else tuple(b[last] for b in scanned.before)
    retention = scanned.decay.state[last, ..., -1] if memory.config.updates_at_chunk_end else ()
    return scanned.final._replace(anchor=anchor, retention=retention)


def _previous_tokens(chunks: Chunks, previous: Weights) -> tuple[Weights, Weights]:
    """Return k and v of the last unmasked token before each chunk, and after the last chunk.

    The first are [g, b, r, h, ...]. Both are zero if no token has been written since the restart.
    """
    k, v, write_mask, restarts = chunks.k, chunks.v, chunks.write_mask > 0, chunks.restarts
    g, b, r, _, c = write_mask.shape
    number = torch.arange(1, g * c + 1, device=k.device).reshape(g, 1, 1, c)
    # Index (from 1) of the last unmasked token before each chunk and before the end; 0 = none.
    latest = torch.where(write_mask[:, :, :, 0], number, 0).amax(dim=-1).cummax(dim=0).values
    latest = torch.cat([torch.zeros_like(latest[:1]), latest])
    # Number of tokens before the last restart.
    begin = torch.full_like(latest, -1)
    if restarts is not None:
        first = torch.where(_as_tensor(restarts, k), number[..., 0] - 1, -1)
        first = first.cummax(dim=0).values.expand(g, b, r)
        begin = torch.cat([first, first[-1:]])
    has_previous = (latest > begin.clamp(min=0))[..., None, None]
    carried = (begin < 0)[..., None, None]

    def gather(x: Array, old: Array) -> Array:
        h, width = x.shape[3], x.shape[5]
        flat = x.permute(1, 2, 0, 4, 3, 5).reshape(b, r, g * c, h, width)
        index = (latest - 1).clamp(min=0).permute(1, 2, 0)[..., None, None]
        gathered = torch.gather(flat, 2, index.expand(b, r, g + 1, h, width))
        gathered = gathered.permute(2, 0, 1, 3, 4).to(old.dtype)
        return torch.where(has_previous, gathered, torch.where(carried, old, torch.zeros_like(old)))

    tokens = tuple(gather(x, old) for x, old in zip((k, v), previous, strict=True))
    return tuple(x[:-1] for x in tokens), tuple(x[-1] for x in tokens)
