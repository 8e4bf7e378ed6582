"""Chunked write: a scan over chunks carries the memory, all other work is parallel (section 6).

The online memory of an MLP is read during the scan, except under `soup` and for inspection.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.segmentation import Plan
from mc_jax.backends import ChunkDecay, Coefficients, Memory, MemoryState, RankOneUpdates, Weights
from mc_jax.backends.base import Apply, mask_coefficients, sum_updates
from mc_jax.cache import start_state, tree_where
from mc_jax.chunk_layout import to_chunks
from mc_jax.delta_rule import ErrorMaps, chunk_errors, solve_chunks
from mc_jax.numerics import SAVE_POLICY, Array, einsum_f32, save_for_backward, scale_rows


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
    restarts: Array | None = None
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
    """Result of a scan over chunks. Leading axes are [g, b, r]; of the final state [b, r]."""

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
    plan: Plan,
    *,
    q: Array | None = None,
    previous: Weights = (),
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
        previous: key [b, h, k] and value [b, h, v] before the first token, if used; () = none.
    """
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    coefficients = jax.tree.map(lambda x: to_chunks(x, plan), coefficients)
    write_mask = to_chunks(mask[:, :, None].astype(coefficients.step.dtype), plan)
    queries = None if q is None else to_chunks(q, plan)
    restarts = _by_chunk(plan.restarts) if plan.restarts[:, 1:].any() else None
    start = start_state(memory, initial, k[0], v[0])
    completes = None if plan.complete_chunks.all() else _by_chunk(plan.complete_chunks)
    chunks = Chunks(k, v, coefficients, write_mask, queries, restarts, completes_chunk=completes)
    state = start
    if previous:
        before = zip(previous, start.previous, strict=True)
        state = start._replace(previous=tuple(x[:, None].astype(s.dtype) for x, s in before))
    scanned = scan_chunks(memory, chunks, state, start)
    final = _add_chunk_start(memory, scanned, plan)
    return WriteResult(
        online=online_memory(memory, scanned, start, restarts),
        read=scanned.read,
        ends=jax.tree.map(
            lambda b, f: _segment_ends(b, f, plan), scanned.before, scanned.final.weights
        ),
        final=jax.tree.map(lambda x: x[:, -1], final),
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
            jnp.concatenate([p[..., None, :].astype(x.dtype), x], axis=-2)
            for p, x in zip(before, (k, v), strict=True)
        )
    if memory.config.gradient_uses_weights:
        return _scan_with_weights(memory, chunks._replace(k=k, v=v), decay, state, start)
    updates = memory.rank_one_updates((), k, v)
    if memory.config.delta_rule:
        retention = mask_coefficients(chunks.coefficients, chunks.write_mask).retention
        maps = solve_chunks(updates, decay, retention, memory.target, k.dtype)
        return _scan_delta_rule(memory, maps, decay, state, start, restarts, k.dtype)
    carried, final = _scan_sums(memory, updates, decay, state, start, restarts, k.dtype)
    return ScanResult(carried, (), updates, decay, final._replace(previous=previous))


def online_memory(
    memory: Memory, scanned: ScanResult, start: MemoryState, restarts: Array | None
) -> OnlineMemory | None:
    """Return the online memory of chunks [g, b, r, ...]; None if the scan has read it."""
    updates = scanned.updates
    if updates is None:
        return None
    if restarts is None:
        before, momentum = scanned.before, scanned.momentum
        return OnlineMemory(before, momentum, updates, scanned.decay, memory.target)
    condition = restarts[..., None, None, None]

    def pick(start: Weights, before: Weights) -> Weights:
        return tuple(jnp.where(condition, s, b) for s, b in zip(start, before, strict=True))

    weights, momentum = pick(start.weights, scanned.before), pick(start.momentum, scanned.momentum)
    return OnlineMemory(weights, momentum, updates, scanned.decay, memory.target)


def online_apply(online: OnlineMemory, dtype: jnp.dtype) -> Apply:
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
            z += einsum_f32("...oi,...ci->...co", online.target[layer], scaled, dtype=dtype)
        if decay.momentum is not None:
            scaled = scale_rows(decay.momentum, a)
            z += einsum_f32("...oi,...ci->...co", online.momentum[layer], scaled, dtype=dtype)
        similarity = einsum_f32("...ci,...ei->...ce", a, updates.activations[layer], dtype=dtype)
        within_chunk = einsum_f32(
            "...ce,...eo->...co", similarity * decay.updates, updates.errors[layer], dtype=dtype
        )
        return save_for_backward(z - within_chunk)

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

    def end(state: MemoryState) -> MemoryState:
        return tree_where(completes_chunk, memory.end_chunk(state), state)

    return jax.lax.cond(jnp.any(completes_chunk), end, lambda state: state, state)


def _scan_with_weights(
    memory: Memory, chunks: Chunks, decay: ChunkDecay, state: MemoryState, start: MemoryState
) -> ScanResult:
    k, v, _, _, q, restarts, has_first_token, completes_chunk = chunks

    @partial(jax.checkpoint, prevent_cse=False, policy=SAVE_POLICY)
    def write(*chunk: Any) -> ChunkResult:
        return write_chunk(memory, *chunk)

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        k, v, q, decay, restart, has_first_token, completes_chunk = chunk
        state = carry if restart is None else tree_where(restart, start, carry)
        begin = state.weights, jax.tree.map(jnp.ones_like, state.retention)
        if has_first_token is not None:
            begin = tree_where(has_first_token, begin, (state.anchor, state.retention))
        retention = jax.tree.map(lambda x: x * decay.state[..., -1], begin[1])
        state = state._replace(anchor=begin[0], retention=retention)
        new = write(state, k, v, q, decay, completes_chunk)
        after = state._replace(weights=new.weights, momentum=new.momentum)
        if has_first_token is None:
            after = after._replace(anchor=carry.anchor)
        before = carry.weights, () if q is not None else carry.momentum
        return after, (*before, new.updates, new.read)

    inputs = (k, v, q, decay, restarts, has_first_token, completes_chunk)
    final, (before, momentum, updates, read) = jax.lax.scan(step, state, inputs)
    return ScanResult(before, momentum, updates, decay, final, read)


def _scan_delta_rule(
    memory: Memory,
    maps: ErrorMaps,
    decay: ChunkDecay,
    state: MemoryState,
    start: MemoryState,
    restarts: Array | None,
    dtype: jnp.dtype,
) -> ScanResult:
    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        maps, decay, restart = chunk
        state = carry if restart is None else tree_where(restart, start, carry)
        errors = chunk_errors(maps, state, dtype)
        updates = RankOneUpdates((maps.activations,), (errors,))
        after = memory.apply_updates(state, updates, decay, dtype)
        return after, (carry.weights, carry.momentum, errors)

    final, (before, momentum, errors) = jax.lax.scan(step, state, (maps, decay, restarts))
    updates = RankOneUpdates((maps.activations,), (errors,))
    return ScanResult(before, momentum, updates, decay, final)


def _scan_sums(
    memory: Memory,
    updates: RankOneUpdates,
    decay: ChunkDecay,
    state: MemoryState,
    start: MemoryState,
    restarts: Array | None,
    dtype: jnp.dtype,
) -> tuple[Weights, MemoryState]:
    # No gradient depends on the memory, so all products are batched and the scan only accumulates.
    (add,) = sum_updates(updates, decay.updates[..., -1, :], dtype)
    retention = decay.state[..., -1]

    def step(carry: MemoryState, chunk):  # type: ignore[no-untyped-def]
        retention, add, restart = chunk
        state = carry if restart is None else tree_where(restart, start, carry)
        (retained,) = memory.retain(state.weights, retention)
        return state._replace(weights=(retained - add,)), carry.weights

    final, before = jax.lax.scan(step, state, (retention, add, restarts))
    return before, final


def _segment_ends(before: Array, final: Array, plan: Plan) -> Array:
    """Return the memory after each segment [b, n, h, ...] from the memories before chunks."""
    if plan.rows > 1:
        return final
    ends = before[plan.last_chunk[:-1] + 1, :, 0]
    return jnp.concatenate([jnp.moveaxis(ends, 0, 1), final], axis=1)


def _by_chunk(flags: np.ndarray) -> Array:
    """Return bool [g, 1, r] from [r, g]."""
    return jnp.asarray(flags.T)[:, None]


def _add_chunk_start(memory: Memory, scanned: ScanResult, plan: Plan) -> MemoryState:
    """Return the final state [b, r, ...] with anchor and retention of the last token's chunk."""
    if not memory.config.gradient_uses_weights:
        return scanned.final
    last = int(plan.last_chunk[-1]) % plan.restarts.shape[1]
    # After a restart, the anchor is that of the initial state.
    restarted = plan.restarts[-1, last]
    anchor = scanned.final.anchor if restarted else tuple(b[last] for b in scanned.before)
    retention = scanned.decay.state[last, ..., -1] if memory.config.updates_at_chunk_end else ()
    return scanned.final._replace(anchor=anchor, retention=retention)


def _previous_tokens(chunks: Chunks, previous: Weights) -> tuple[Weights, Weights]:
    """Return k and v of the last unmasked token before each chunk, and after the last chunk.

    The first are [g, b, r, h, ...]. Both are zero if no token has been written since the restart.
    """
    k, v, write_mask, restarts = chunks.k, chunks.v, chunks.write_mask > 0, chunks.restarts
    ordinal = np.arange(1, write_mask.shape[-1] + 1)
    last = jnp.max(jnp.where(write_mask, ordinal, 0), axis=-1)[..., None, None]  # 0 = none

    def step(carry: Weights, chunk):  # type: ignore[no-untyped-def]
        k, v, last, restart = chunk
        if restart is not None:
            carry = tree_where(restart, jax.tree.map(jnp.zeros_like, carry), carry)
        tokens = (
            jnp.concatenate([old[..., None, :], x.astype(old.dtype)], axis=-2)
            for old, x in zip(carry, (k, v), strict=True)
        )
        after = tuple(jnp.take_along_axis(x, last, axis=-2)[..., 0, :] for x in tokens)
        return after, carry

    after, before = jax.lax.scan(step, previous, (k, v, last, restarts))
    return before, after
