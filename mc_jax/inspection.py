"""What a layer did with a sequence: gates, norms of its memories, inner losses; a row a token.

In a chunk W_t, S_t and W_t - W_{t-1} are sums of the same few matrices: the chunk's first memory,
its momentum and its rank-one events. Their norms are quadratic forms in those matrices' inner
products, so no token's weights are built. Inner losses are read in the dual form, with the key in
the query's place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.segmentation import Plan
from mc_jax.backends import ChunkMix, Coefficients, Memory
from mc_jax.backends.base import decay_products, mask_coefficients
from mc_jax.cache import Segments
from mc_jax.chunked import Online, online_apply
from mc_jax.layout import from_chunks, to_chunks
from mc_jax.numerics import Array, product


class InnerLoop(NamedTuple):
    """What each token's write did to its memory, in the state dtype; no gradient flows from here.

    Norms are Frobenius norms over all layers, a normaliser's row included. The inner loss is the
    memory's own, `-<M(k), v>` or `||M(k) - v||²`, that of a matrix without its normaliser.
    """

    memory_norm: Array  # of W_t [b, t, h]; at a masked token that of the unchanged memory
    momentum_norm: Array | None  # of S_t [b, t, h], likewise; None where there is no momentum
    update_norm: Array  # of W_t - W_{t-1} [b, t, h]; 0 at a masked token
    loss_before: Array  # of (k_t, v_t) at W_{t-1} [b, t, h]; 0 at a masked token
    loss_after: Array  # of (k_t, v_t) at W_t [b, t, h]; 0 at a masked token


class Trace(NamedTuple):
    """What a layer did with a sequence, one row a token; from the pass that made the output.

    Gradients flow from the gates and their entropy alone.
    """

    gates: Array  # [b, t, h, n + 1]: cached segments, the online memory last; 0 where unread
    entropy: Array  # of the gates' shares, in nats [b, t, h]
    token_index: Array  # [t]
    segment_index: Array  # [t] the segment of each token
    cached_count: Array  # [t] the memories cached before that segment
    segment_norm: Array  # Frobenius norm of each cached memory, all layers [b, n, h]
    segment_length: Array  # real tokens of each segment [b, n]
    read_count: Array  # tokens whose gate on each cached memory is not 0, int32 [b, n, h]
    memory_norm: Array  # this and the rest [b, t, h]: see `InnerLoop`
    momentum_norm: Array | None
    update_norm: Array
    loss_before: Array
    loss_after: Array

    @property
    def router_weights(self) -> Array:
        """The gates [b, t, h, n + 1], under their name in the package `memory-caching`."""
        return self.gates


def make_trace(gates: Array, segments: Segments, inner: InnerLoop, plan: Plan) -> Trace:
    """Put a trace together.

    Args:
        gates: [b, t, h, n + 1].
        segments: the cached memories.
        inner: from `watch_writes`.
        plan: the segments.
    """
    total = jnp.sum(gates, axis=-1, keepdims=True)
    share = gates / jnp.where(total > 0, total, jnp.ones_like(total))
    # Of an unread memory, a logarithm of 0 would have no gradient.
    logs = jnp.log(jnp.where(share > 0, share, jnp.ones_like(share)))
    weights = jax.lax.stop_gradient(segments.weights)
    squares = [jnp.sum(w * w, axis=(-2, -1)) for w in weights]
    reads = jnp.sum(gates[..., :-1] > 0, axis=1, dtype=jnp.int32)
    return Trace(
        gates=gates,
        entropy=-jnp.sum(share * logs, axis=-1),
        token_index=jnp.arange(plan.tokens, dtype=jnp.int32),
        segment_index=jnp.asarray(plan.segment_of, jnp.int32),
        cached_count=jnp.asarray(plan.segment_of, jnp.int32),
        segment_norm=jnp.sqrt(sum(squares[1:], squares[0])),
        segment_length=segments.length,
        read_count=reads.swapaxes(1, 2),
        **inner._asdict(),
    )


def watch_writes(
    memory: Memory,
    online: Online,
    k: Array,
    v: Array,
    coefficients: Coefficients,
    mask: Array,
    plan: Plan,
) -> InnerLoop:
    """Measure each token's write.

    Args:
        memory: the memory kind.
        online: what `write_chunks` made of the arguments that follow.
        k: keys [b, t, h, k], zero at masked tokens.
        v: values [b, t, h, v], zero at masked tokens.
        coefficients: each [b, t, h].
        mask: [b, t] bool, True = a real token.
        plan: segments and chunks.
    """
    online, k, v, coefficients = jax.lax.stop_gradient((online, k, v, coefficients))
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    at = jax.tree.map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].astype(at.step.dtype), plan)
    at = mask_coefficients(at, written)
    after, before = online.mix, _token_before(online.mix)
    change = _change(after, before, at.retention)
    gram = _inner_products(online)

    def by_token(x: Array) -> Array:
        return from_chunks(x[..., None], plan)[..., 0]

    def norm(mix: ChunkMix) -> Array:
        parts = [mix.state, *(() if mix.momentum is None else (mix.momentum,))]
        m = len(parts)
        states, events = jnp.stack(parts, axis=-1), -mix.events
        # By blocks: of states and events in one array, XLA's CPU has summed wrong squares.
        own = product("...cm,...mn->...cn", states, gram[..., :m, :m], exact=True)
        cross = product("...cm,...me->...ce", states, gram[..., :m, m:], exact=True)
        pairs = product("...ce,...ef->...cf", events, gram[..., m:, m:], exact=True)
        squares = jnp.sum(states * own, axis=-1)
        squares += jnp.sum(events * (2 * cross + pairs), axis=-1)
        return jnp.sqrt(jnp.maximum(squares, 0))

    def loss(mix: ChunkMix) -> Array:
        apply = online_apply(online._replace(mix=mix), k.dtype)
        return by_token(written * memory.loss(apply, k, v))

    momentum_norm = None
    if at.momentum is not None:
        speed = decay_products(at.momentum)
        keep, add = speed[..., 0], speed[..., 1:] * at.step[..., None, :]
        momentum_norm = by_token(norm(ChunkMix(jnp.zeros_like(keep), add, keep)))
    inner = InnerLoop(
        memory_norm=by_token(norm(after)),
        momentum_norm=momentum_norm,
        update_norm=by_token(written * norm(change)),
        loss_before=loss(before),
        loss_after=loss(after),
    )
    # The memory's own norm has parameters, too.
    return jax.lax.stop_gradient(inner)


def _token_before(mix: ChunkMix) -> ChunkMix:
    """Return the coefficients of W_{t-1} in the place of those of W_t."""
    state, events, momentum = mix.state, mix.events, mix.momentum
    state = jnp.concatenate([jnp.ones_like(state[..., :1]), state[..., :-1]], axis=-1)
    events = jnp.concatenate([jnp.zeros_like(events[..., :1, :]), events[..., :-1, :]], axis=-2)
    if momentum is not None:
        first = jnp.zeros_like(momentum[..., :1])
        momentum = jnp.concatenate([first, momentum[..., :-1]], axis=-1)
    return mix._replace(state=state, events=events, momentum=momentum)


def _change(after: ChunkMix, before: ChunkMix, retention: Array) -> ChunkMix:
    """Return the coefficients of W_t - W_{t-1}."""
    # The memory is far larger than its update: P_t - P_{t-1} would lose digits.
    state = (retention - 1) * before.state
    events = after.events - before.events
    if after.momentum is None or before.momentum is None:
        return ChunkMix(state, events)
    return ChunkMix(state, events, after.momentum - before.momentum)


def _inner_products(online: Online) -> Array:
    """Return the inner products, summed over layers, of what a chunk's memories are sums of.

    Returns:
        [..., h, m + e, m + e]: the memory and the momentum (m = 2; without it m = 1) with which the
        chunk began, then its e events.
    """
    layers = []
    for layer, weight in enumerate(online.weights):
        states = jnp.stack([weight, *online.momentum[layer : layer + 1]], axis=-3)
        a, delta = (x[layer].astype(weight.dtype) for x in online.events)
        read = product("...moi,...ei->...meo", states, a, exact=True)
        cross = product("...meo,...eo->...me", read, delta, exact=True)
        own = product("...moi,...noi->...mn", states, states, exact=True)
        pairs = product("...eo,...fo->...ef", delta, delta, exact=True)
        pairs *= product("...ei,...fi->...ef", a, a, exact=True)
        top = jnp.concatenate([own, cross], axis=-1)
        low = jnp.concatenate([cross.swapaxes(-1, -2), pairs], axis=-1)
        layers.append(jnp.concatenate([top, low], axis=-2))
    return sum(layers[1:], layers[0])
