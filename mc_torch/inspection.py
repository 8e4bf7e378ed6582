"""What a layer did with a sequence: gates, norms of its memories, inner losses; a row a token.

In a chunk W_t, S_t and W_t - W_{t-1} are sums of the same few matrices: the chunk's first memory,
its momentum and its rank-one events. Their norms are quadratic forms in those matrices' inner
products, so no token's weights are built. Inner losses are read in the dual form, with the key in
the query's place.
"""

from typing import NamedTuple

import torch

from mc_torch.backends import ChunkMix, Coefficients, Memory
from mc_torch.backends.base import decay_products, mask_coefficients
from mc_torch.cache import Segments
from mc_torch.chunked import Online, online_apply
from mc_torch.layout import TensorPlan, from_chunks, to_chunks
from mc_torch.numerics import Array, product, tree_map


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


def make_trace(gates: Array, segments: Segments, inner: InnerLoop, plan: TensorPlan) -> Trace:
    """Put a trace together.

    Args:
        gates: [b, t, h, n + 1].
        segments: the cached memories.
        inner: from `watch_writes`.
        plan: the segments.
    """
    total = torch.sum(gates, dim=-1, keepdim=True)
    share = gates / torch.where(total > 0, total, torch.ones_like(total))
    # Of an unread memory, a logarithm of 0 would have no gradient.
    logs = torch.log(torch.where(share > 0, share, torch.ones_like(share)))
    weights = [w.detach() for w in segments.weights]
    squares = [torch.sum(w * w, dim=(-2, -1)) for w in weights]
    reads = torch.sum(gates[..., :-1] > 0, dim=1, dtype=torch.int32)
    segment_of = torch.tensor(plan.segment_of, dtype=torch.int32, device=gates.device)
    return Trace(
        gates=gates,
        entropy=-torch.sum(share * logs, dim=-1),
        token_index=torch.arange(plan.tokens, dtype=torch.int32, device=gates.device),
        segment_index=segment_of,
        cached_count=segment_of,
        segment_norm=torch.sqrt(sum(squares[1:], squares[0])),
        segment_length=segments.length,
        read_count=reads.transpose(1, 2),
        **inner._asdict(),
    )


@torch.no_grad()
def watch_writes(
    memory: Memory,
    online: Online,
    k: Array,
    v: Array,
    coefficients: Coefficients,
    mask: Array,
    plan: TensorPlan,
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
    k, v = to_chunks(k, plan), to_chunks(v, plan)
    at = tree_map(lambda x: to_chunks(x, plan), coefficients)
    written = to_chunks(mask[:, :, None].to(at.step.dtype), plan)
    at = mask_coefficients(at, written)
    after, before = online.mix, _token_before(online.mix)
    change = _change(after, before, at.retention)
    gram = _inner_products(online)

    def by_token(x: Array) -> Array:
        return from_chunks(x[..., None], plan)[..., 0]

    def norm(mix: ChunkMix) -> Array:
        parts = [mix.state, *(() if mix.momentum is None else (mix.momentum,))]
        m = len(parts)
        states, events = torch.stack(parts, dim=-1), -mix.events
        own = product("...cm,...mn->...cn", states, gram[..., :m, :m], exact=True)
        cross = product("...cm,...me->...ce", states, gram[..., :m, m:], exact=True)
        pairs = product("...ce,...ef->...cf", events, gram[..., m:, m:], exact=True)
        squares = torch.sum(states * own, dim=-1)
        squares = squares + torch.sum(events * (2 * cross + pairs), dim=-1)
        return torch.sqrt(squares.clamp(min=0))

    def loss(mix: ChunkMix) -> Array:
        apply = online_apply(online._replace(mix=mix), k.dtype)
        return by_token(written * memory.loss(apply, k, v))

    momentum_norm = None
    if at.momentum is not None:
        speed = decay_products(at.momentum)
        keep, add = speed[..., 0], speed[..., 1:] * at.step[..., None, :]
        momentum_norm = by_token(norm(ChunkMix(torch.zeros_like(keep), add, keep)))
    return InnerLoop(
        memory_norm=by_token(norm(after)),
        momentum_norm=momentum_norm,
        update_norm=by_token(written * norm(change)),
        loss_before=loss(before),
        loss_after=loss(after),
    )


def _token_before(mix: ChunkMix) -> ChunkMix:
    """Return the coefficients of W_{t-1} in the place of those of W_t."""
    state, events, momentum = mix.state, mix.events, mix.momentum
    state = torch.cat([torch.ones_like(state[..., :1]), state[..., :-1]], dim=-1)
    events = torch.cat([torch.zeros_like(events[..., :1, :]), events[..., :-1, :]], dim=-2)
    if momentum is not None:
        first = torch.zeros_like(momentum[..., :1])
        momentum = torch.cat([first, momentum[..., :-1]], dim=-1)
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
        states = torch.stack([weight, *online.momentum[layer : layer + 1]], dim=-3)
        a, delta = (x[layer].to(weight.dtype) for x in online.events)
        read = product("...moi,...ei->...meo", states, a, exact=True)
        cross = product("...meo,...eo->...me", read, delta, exact=True)
        own = product("...moi,...noi->...mn", states, states, exact=True)
        pairs = product("...eo,...fo->...ef", delta, delta, exact=True)
        pairs = pairs * product("...ei,...fi->...ef", a, a, exact=True)
        top = torch.cat([own, cross], dim=-1)
        low = torch.cat([cross.transpose(-1, -2), pairs], dim=-1)
        layers.append(torch.cat([top, low], dim=-2))
    return sum(layers[1:], layers[0])
