"""Statistics of a layer per token: gates, norms of memories and updates, inner losses.

Within a chunk, W_t, S_t and W_t - W_{t-1} are linear combinations of the same matrices: the memory
and the momentum before the chunk, and its rank-one updates. Their norms are computed from the inner
products of these matrices, without materializing W_t. Inner losses use the dual form, with keys as
queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.segmentation import Plan
from mc_jax.backends import ChunkDecay, Coefficients, Memory
from mc_jax.backends.base import decay_products, mask_coefficients
from mc_jax.cache import Segments
from mc_jax.chunk_layout import from_chunks, to_chunks
from mc_jax.chunked import OnlineMemory, online_apply
from mc_jax.numerics import Array, einsum_f32, expand_leading_dims


class InnerLoop(NamedTuple):
    """Statistics of each token's write, in the state dtype and without gradient.

    Norms are Frobenius norms over all layers, including normalizer rows. The inner loss is
    `-<M(k), v>` or `||M(k) - v||²`, without the normalizer of a matrix memory.
    """

    memory_norm: Array  # norm of W_t [b, t, h]
    momentum_norm: Array | None  # norm of S_t [b, t, h]; None without momentum
    update_norm: Array  # norm of W_t - W_{t-1} [b, t, h]; 0 at masked tokens
    loss_before: Array  # inner loss of (k_t, v_t) at W_{t-1} [b, t, h]; 0 at masked tokens
    loss_after: Array  # inner loss of (k_t, v_t) at W_t [b, t, h]; 0 at masked tokens


class Trace(NamedTuple):
    """Statistics of a layer on a sequence, computed with its output.

    Only the gates and their entropy have gradients.
    """

    gates: Array  # [b, t, h, n + 1]: cached memories, then the online memory; 0 if not read
    entropy: Array  # entropy of the normalized gates, in nats [b, t, h]
    token_index: Array  # [t]
    segment_index: Array  # [t] segment of each token
    cached_count: Array  # [t] number of memories cached before that segment
    segment_norm: Array  # Frobenius norm of each cached memory over all layers [b, n, h]
    segment_length: Array  # number of unmasked tokens per segment [b, n]
    read_count: Array  # number of tokens that read each cached memory, int32 [b, n, h]
    memory_norm: Array  # [b, t, h], as in `InnerLoop`
    momentum_norm: Array | None  # [b, t, h], as in `InnerLoop`
    update_norm: Array  # [b, t, h], as in `InnerLoop`
    loss_before: Array  # [b, t, h], as in `InnerLoop`
    loss_after: Array  # [b, t, h], as in `InnerLoop`

    @property
    def router_weights(self) -> Array:
        """Alias of `gates` [b, t, h, n + 1], as named by `memory-caching`."""
        return self.gates


def make_trace(gates: Array, segments: Segments, inner: InnerLoop, plan: Plan) -> Trace:
    """Assemble a trace.

    Args:
        gates: [b, t, h, n + 1].
        segments: the cached memories.
        inner: from `measure_writes`.
        plan: the segments.
    """
    total = jnp.sum(gates, axis=-1, keepdims=True)
    probabilities = gates / jnp.where(total > 0, total, jnp.ones_like(total))
    # The logarithm of 0, the gate of an unread memory, would have a NaN gradient.
    logs = jnp.log(jnp.where(probabilities > 0, probabilities, jnp.ones_like(probabilities)))
    weights = jax.lax.stop_gradient(segments.weights)
    squares = [jnp.sum(w * w, axis=(-2, -1)) for w in weights]
    reads = jnp.sum(gates[..., :-1] > 0, axis=1, dtype=jnp.int32)
    return Trace(
        gates=gates,
        entropy=-jnp.sum(probabilities * logs, axis=-1),
        token_index=jnp.arange(plan.tokens, dtype=jnp.int32),
        segment_index=jnp.asarray(plan.segment_of, jnp.int32),
        cached_count=jnp.asarray(plan.segment_of, jnp.int32),
        segment_norm=jnp.sqrt(sum(squares[1:], squares[0])),
        segment_length=segments.length,
        read_count=reads.swapaxes(1, 2),
        **inner._asdict(),
    )


def measure_writes(
    memory: Memory,
    online: OnlineMemory,
    k: Array,
    v: Array,
    coefficients: Coefficients,
    mask: Array,
    plan: Plan,
) -> InnerLoop:
    """Compute the statistics of each token's write.

    Args:
        memory: the memory kind.
        online: online memory, from `write_chunks` with the following arguments.
        k: keys [b, t, h, k], zero at masked tokens.
        v: values [b, t, h, v], zero at masked tokens.
        coefficients: each [b, t, h].
        mask: [b, t] bool, False at masked tokens.
        plan: segments and chunks.
    """
    online, k, v, coefficients = jax.lax.stop_gradient((online, k, v, coefficients))
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    coefficients = jax.tree.map(lambda x: to_chunks(x, plan), coefficients)
    write_mask = to_chunks(mask[:, :, None].astype(coefficients.step.dtype), plan)
    coefficients = mask_coefficients(coefficients, write_mask)
    after, before = online.decay, _previous_token(online.decay)
    difference = _difference(after, before, coefficients.retention)
    gram = _inner_products(online)

    def by_token(x: Array) -> Array:
        return from_chunks(x[..., None], plan)[..., 0]

    def norm(decay: ChunkDecay, adds_target: bool = False) -> Array:
        parts = [decay.state, *(() if decay.momentum is None else (decay.momentum,))]
        if online.target:
            parts.append(jnp.full_like(decay.state, float(adds_target)))
        m = len(parts)
        states, updates = jnp.stack(parts, axis=-1), -decay.updates
        # States and updates are separate arrays: for their concatenation, XLA:CPU has returned
        # wrong sums.
        state_products = einsum_f32("...cm,...mn->...cn", states, gram[..., :m, :m], exact=True)
        cross = einsum_f32("...cm,...me->...ce", states, gram[..., :m, m:], exact=True)
        pairs = einsum_f32("...ce,...ef->...cf", updates, gram[..., m:, m:], exact=True)
        squares = jnp.sum(states * state_products, axis=-1)
        squares += jnp.sum(updates * (2 * cross + pairs), axis=-1)
        return jnp.sqrt(jnp.maximum(squares, 0))

    def loss(decay: ChunkDecay) -> Array:
        apply = online_apply(online._replace(decay=decay), k.dtype)
        return by_token(write_mask * memory.loss(apply, k, v))

    momentum_norm = None
    if coefficients.momentum is not None:
        momentum_decay = decay_products(coefficients.momentum)
        retention, updates = (
            momentum_decay[..., 0],
            momentum_decay[..., 1:] * coefficients.step[..., None, :],
        )
        momentum_norm = by_token(norm(ChunkDecay(jnp.zeros_like(retention), updates, retention)))
    inner = InnerLoop(
        memory_norm=by_token(norm(after, adds_target=True)),
        momentum_norm=momentum_norm,
        update_norm=by_token(write_mask * norm(difference)),
        loss_before=loss(before),
        loss_after=loss(after),
    )
    # Also stops the gradients of the memory's layer norm.
    return jax.lax.stop_gradient(inner)


def _previous_token(decay: ChunkDecay) -> ChunkDecay:
    """Return the decay weights of W_{t-1} from those of W_t."""
    state, updates, momentum = decay.state, decay.updates, decay.momentum
    state = jnp.concatenate([jnp.ones_like(state[..., :1]), state[..., :-1]], axis=-1)
    updates = jnp.concatenate([jnp.zeros_like(updates[..., :1, :]), updates[..., :-1, :]], axis=-2)
    if momentum is not None:
        first = jnp.zeros_like(momentum[..., :1])
        momentum = jnp.concatenate([first, momentum[..., :-1]], axis=-1)
    return decay._replace(state=state, updates=updates, momentum=momentum)


def _difference(after: ChunkDecay, before: ChunkDecay, retention: Array) -> ChunkDecay:
    """Return the decay weights of W_t - W_{t-1}."""
    # P_t - P_{t-1} would lose precision, because the memory is much larger than its update.
    state = (retention - 1) * before.state
    updates = after.updates - before.updates
    if after.momentum is None or before.momentum is None:
        return ChunkDecay(state, updates)
    return ChunkDecay(state, updates, after.momentum - before.momentum)


def _inner_products(online: OnlineMemory) -> Array:
    """Return the inner products, summed over layers, of a chunk's initial states and updates.

    Returns:
        [..., h, m + e, m + e]: first the m states, which are the memory before the chunk, its
        momentum, if any, and the target of the retention, if any; then the e updates of the chunk.
        The target is subtracted from the memory, because the two may be almost equal.
    """
    layers = []
    for layer, weight in enumerate(online.weights):
        parts = [weight, *online.momentum[layer : layer + 1]]
        if online.target:
            target = jnp.zeros_like(weight) + expand_leading_dims(
                online.target[layer].astype(weight.dtype), weight.ndim
            )
            parts = [weight - target, *parts[1:], target]
        states = jnp.stack(parts, axis=-3)
        a, delta = (x[layer].astype(weight.dtype) for x in online.updates)
        read = einsum_f32("...moi,...ei->...meo", states, a, exact=True)
        cross = einsum_f32("...meo,...eo->...me", read, delta, exact=True)
        state_products = einsum_f32("...moi,...noi->...mn", states, states, exact=True)
        pairs = einsum_f32("...eo,...fo->...ef", delta, delta, exact=True)
        pairs *= einsum_f32("...ei,...fi->...ef", a, a, exact=True)
        top = jnp.concatenate([state_products, cross], axis=-1)
        low = jnp.concatenate([cross.swapaxes(-1, -2), pairs], axis=-1)
        layers.append(jnp.concatenate([top, low], axis=-2))
    return sum(layers[1:], layers[0])
