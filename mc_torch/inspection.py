"""Statistics of a layer per token: gates, norms of memories and updates, inner losses.

Within a chunk, W_t, S_t and W_t - W_{t-1} are linear combinations of the same matrices: the memory
and the momentum before the chunk, and its rank-one updates. Their norms are computed from the inner
products of these matrices, without materializing W_t. Inner losses use the dual form, with keys as
queries.
"""

from typing import NamedTuple

import torch

from mc_core.config import DEAD_NORM
from mc_torch.backends import ChunkDecay, Coefficients, Memory, Weights
from mc_torch.backends.base import (
    apply_weights,
    decay_products,
    mask_coefficients,
    previous_token,
)
from mc_torch.cache import Segments
from mc_torch.chunk_layout import TensorPlan, from_chunks, to_chunks, to_segments
from mc_torch.chunked import OnlineMemory, WriteResult, online_apply
from mc_torch.numerics import Array, einsum_f32, expand_leading_dims, tree_map


class InnerLoop(NamedTuple):
    """Statistics of the writes, in the state dtype and without gradient.

    Norms are Frobenius norms over all layers, including normalizer rows. The inner loss is
    `-<M(k), v>` or `||M(k) - v||²`, without the normalizer of a matrix memory. The loss of a
    segment is the mean over its unmasked tokens at a fixed memory, and 0 if there are none.

    At the first token of a chunk, W_{t-1} is the memory after `Memory.end_chunk`, whose change is
    not part of any update norm.

    A head is dead if its memory hardly changes any more: in the second half of the unmasked tokens,
    all update norms are at most `DEAD_NORM ||W_0||`. If W_0 = 0, nothing is written there.
    """

    memory_norm: Array  # norm of W_t [b, t, h]
    momentum_norm: Array | None  # norm of S_t [b, t, h]; None without momentum
    update_norm: Array  # norm of W_t - W_{t-1} [b, t, h]; 0 at masked tokens
    loss_before: Array  # inner loss of (k_t, v_t) at W_{t-1} [b, t, h]; 0 at masked tokens
    loss_after: Array  # inner loss of (k_t, v_t) at W_t [b, t, h]; 0 at masked tokens
    segment_loss_before: Array  # loss of a segment at the memory before it [b, n, h]
    segment_loss_after: Array  # loss of a segment at its cached memory [b, n, h]
    segment_loss_scale: Array  # denominator of `Trace.recall` [b, n, h]
    dead_heads: Array  # bool [b, h]


class Trace(NamedTuple):
    """Statistics of a layer on a sequence, computed with its output.

    With buckets, the m cached memories are those after the last token, and index i is the bucket of
    2^i segments. Otherwise they are the memories of the n segments.

    Only the gates and their entropy have gradients.
    """

    gates: Array  # [b, t, h, m + 1]: cached memories, then the online memory; 0 if not read
    entropy: Array  # entropy of the normalized gates, in nats [b, t, h]
    token_index: Array  # [t]
    segment_index: Array  # [t] segment of each token
    cached_count: Array  # [t] number of cached memories that a token may read
    segment_norm: Array  # Frobenius norm of each cached memory over all layers [b, m, h]
    segment_length: Array  # number of unmasked tokens per cached memory [b, m]
    read_count: Array  # number of tokens that read each cached memory, int32 [b, m, h]
    memory_norm: Array  # [b, t, h], as in `InnerLoop`
    momentum_norm: Array | None  # [b, t, h], as in `InnerLoop`
    update_norm: Array  # [b, t, h], as in `InnerLoop`
    loss_before: Array  # [b, t, h], as in `InnerLoop`
    loss_after: Array  # [b, t, h], as in `InnerLoop`
    segment_loss_before: Array  # [b, n, h], as in `InnerLoop`
    segment_loss_after: Array  # [b, n, h], as in `InnerLoop`
    segment_loss_scale: Array  # [b, n, h], as in `InnerLoop`
    dead_heads: Array  # bool [b, h], as in `InnerLoop`

    @property
    def router_weights(self) -> Array:
        """Alias of `gates` [b, t, h, n + 1], as named by `memory-caching`."""
        return self.gates

    @property
    def recall(self) -> Array:
        """Recall of each cached memory [b, n, h]: the share of its segment that it has stored.

        `(before - after) / scale` of the losses of the segment. An L2 loss is 0 for a perfect read,
        so the scale is the loss before: recall is `1 - after / before`. A dot loss is -<v, v> for a
        perfect read and 0 for an empty memory, so the scale is the mean of `||v||²`. Recall is 1
        for a perfect read, 0 if the writes change nothing or all tokens are masked, and negative if
        they increase the loss. For a dot loss it grows with the norm of the keys, without limit.
        """
        scale = self.segment_loss_scale
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (self.segment_loss_before - self.segment_loss_after) / scale


def make_trace(gates: Array, segments: Segments, inner: InnerLoop, plan: TensorPlan) -> Trace:
    """Assemble a trace.

    Args:
        gates: [b, t, h, n + 1].
        segments: the cached memories.
        inner: from `measure_writes`.
        plan: the segments.
    """
    total = torch.sum(gates, dim=-1, keepdim=True)
    probabilities = gates / torch.where(total > 0, total, torch.ones_like(total))
    # The logarithm of 0, the gate of an unread memory, would have a NaN gradient.
    logs = torch.log(torch.where(probabilities > 0, probabilities, torch.ones_like(probabilities)))
    weights = tuple(w.detach() for w in segments.weights)
    reads = torch.sum(gates[..., :-1] > 0, dim=1, dtype=torch.int32)
    segment_of = torch.tensor(plan.segment_of, dtype=torch.int32, device=gates.device)
    cached_count = torch.tensor(plan.cached_count, dtype=torch.int32, device=gates.device)
    return Trace(
        gates=gates,
        entropy=-torch.sum(probabilities * logs, dim=-1),
        token_index=torch.arange(plan.tokens, dtype=torch.int32, device=gates.device),
        segment_index=segment_of,
        cached_count=cached_count,
        segment_norm=_weights_norm(weights),
        segment_length=segments.length,
        read_count=reads.transpose(1, 2),
        **inner._asdict(),
    )


@torch.no_grad()
def measure_writes(
    memory: Memory,
    writes: WriteResult,
    k: Array,
    v: Array,
    coefficients: Coefficients,
    mask: Array,
    plan: TensorPlan,
) -> InnerLoop:
    """Compute the statistics of the writes.

    Args:
        memory: the memory kind.
        writes: from `write_chunks` with the following arguments, with `online`.
        k: keys [b, t, h, k], zero at masked tokens.
        v: values [b, t, h, v], zero at masked tokens.
        coefficients: each [b, t, h].
        mask: [b, t] bool, False at masked tokens.
        plan: segments and chunks.
    """
    assert writes.online is not None
    online, ends = writes.online, writes.ends
    lengths = torch.sum(to_segments(mask[:, :, None], plan), dim=-1).transpose(1, 2)  # [b, n, 1]
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    coefficients = tree_map(lambda x: to_chunks(x, plan), coefficients)
    write_mask = to_chunks(mask[:, :, None].to(coefficients.step.dtype), plan)
    coefficients = mask_coefficients(coefficients, write_mask)
    after, before = online.decay, previous_token(online.decay)
    difference = _difference(after, before, coefficients.retention)
    gram = _inner_products(online)

    def by_token(x: Array) -> Array:
        return from_chunks(x[..., None], plan)[..., 0]

    def norm(decay: ChunkDecay, adds_target: bool = False) -> Array:
        parts = [decay.state, *(() if decay.momentum is None else (decay.momentum,))]
        if online.target:
            parts.append(torch.full_like(decay.state, float(adds_target)))
        m = len(parts)
        states, updates = torch.stack(parts, dim=-1), -decay.updates
        state_products = einsum_f32("...cm,...mn->...cn", states, gram[..., :m, :m], exact=True)
        cross = einsum_f32("...cm,...me->...ce", states, gram[..., :m, m:], exact=True)
        pairs = einsum_f32("...ce,...ef->...cf", updates, gram[..., m:, m:], exact=True)
        squares = torch.sum(states * state_products, dim=-1)
        squares = squares + torch.sum(updates * (2 * cross + pairs), dim=-1)
        return torch.sqrt(squares.clamp(min=0))

    def loss(decay: ChunkDecay) -> Array:
        apply = online_apply(online._replace(decay=decay), k.dtype)
        return by_token(write_mask * memory.loss(apply, k, v))

    def segment_mean(x: Array) -> Array:
        total = torch.sum(to_segments(by_token(write_mask * x), plan), dim=-1).transpose(1, 2)
        return total / lengths.clamp(min=1)

    def segment_loss(weights: Weights) -> Array:
        weights = tree_map(lambda w: _to_chunks_of_segments(w, plan), weights)
        return segment_mean(memory.loss(apply_weights(weights, k.dtype), k, v))

    momentum_norm = None
    if coefficients.momentum is not None:
        momentum_decay = decay_products(coefficients.momentum)
        retention, updates = (
            momentum_decay[..., 0],
            momentum_decay[..., 1:] * memory.step(coefficients)[..., None, :],
        )
        momentum_norm = by_token(norm(ChunkDecay(torch.zeros_like(retention), updates, retention)))
    starts = tree_map(lambda w: _segment_starts(w, plan), online.weights)
    losses = segment_loss(starts), segment_loss(ends)
    values = v.to(write_mask.dtype)
    update_norm = by_token(write_mask * norm(difference))
    initial_norm = _weights_norm(tuple(s[:, 0] for s in starts))
    return InnerLoop(
        memory_norm=by_token(norm(after, adds_target=True)),
        momentum_norm=momentum_norm,
        update_norm=update_norm,
        loss_before=loss(before),
        loss_after=loss(after),
        segment_loss_before=losses[0],
        segment_loss_after=losses[1],
        segment_loss_scale=(
            losses[0] if memory.config.has_l2_loss else segment_mean(torch.sum(values * values, -1))
        ),
        dead_heads=_dead_heads(update_norm, mask, initial_norm),
    )


def _segment_starts(weight: Array, plan: TensorPlan) -> Array:
    """Return the memory before each segment [b, n, h, o, i] from those of chunks [g, b, r, ...]."""
    chunks = weight.shape[0]
    return weight[plan.first_chunk % chunks, :, plan.first_chunk // chunks].transpose(0, 1)


def _to_chunks_of_segments(weight: Array, plan: TensorPlan) -> Array:
    """Copy memories of segments [b, n, h, o, i] to their chunks: [g, b, r, h, o, i]."""
    b, _, *rest = weight.shape
    weight = torch.index_select(weight, 1, plan.chunk_segments).reshape(b, plan.rows, -1, *rest)
    return torch.moveaxis(weight, 2, 0)


def _weights_norm(weights: Weights) -> Array:
    """Return the Frobenius norm [...] over all layers of weights [..., o, i]."""
    squares = [torch.sum(w * w, dim=(-2, -1)) for w in weights]
    return torch.sqrt(sum(squares[1:], squares[0]))


def _dead_heads(update_norm: Array, mask: Array, initial_norm: Array) -> Array:
    """Return bool [b, h], from [b, t, h], [b, t] and the norm of W_0 [b, h]; see `InnerLoop`."""
    rank = torch.cumsum(mask, dim=1)
    late = mask & (2 * rank > rank[:, -1:])
    updates = torch.where(late[..., None], update_norm, torch.zeros_like(update_norm))
    return updates.amax(dim=1) <= DEAD_NORM * initial_norm


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
            target = torch.zeros_like(weight) + expand_leading_dims(
                online.target[layer].to(weight.dtype), weight.ndim
            )
            parts = [weight - target, *parts[1:], target]
        states = torch.stack(parts, dim=-3)
        a, delta = (x[layer].to(weight.dtype) for x in online.updates)
        read = einsum_f32("...moi,...ei->...meo", states, a, exact=True)
        cross = einsum_f32("...meo,...eo->...me", read, delta, exact=True)
        state_products = einsum_f32("...moi,...noi->...mn", states, states, exact=True)
        pairs = einsum_f32("...eo,...fo->...ef", delta, delta, exact=True)
        pairs = pairs * einsum_f32("...ei,...fi->...ef", a, a, exact=True)
        top = torch.cat([state_products, cross], dim=-1)
        low = torch.cat([cross.transpose(-1, -2), pairs], dim=-1)
        layers.append(torch.cat([top, low], dim=-2))
    return sum(layers[1:], layers[0])
