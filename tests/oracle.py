"""Memory Caching (arXiv:2602.24281) in NumPy float64: one head, one token at a time.

The reference that all other forms are tested against. Letters: b batch, t tokens,
h heads, k key width, v value width, n segments; a weight is `[out, in]`, so a read is `W @ q`.
Below `memory_caching` every function sees a single head of a single sequence.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from helpers.oracle_buckets import Block, Bucket, buckets_of
from helpers.oracle_gates import gates_of, pooled
from helpers.oracle_mlp import clipped, inner_gradient, mlp, orthogonalized
from mc_core import MCConfig, MemoryConfig
from mc_core.config import NORMALIZER_FLOOR

Array = np.ndarray
Layers = tuple[Array, ...]  # weights, first layer first, each [out, in]
Norm = tuple[Array, Array] | None  # gain and bias of the layer norm, each [v]


class OracleResult(NamedTuple):
    """Result of `memory_caching`, in float64."""

    output: Array  # [b, t, h, v], 0 at masked tokens
    gates: Array  # [b, t, h, n + 1], each cached segment's weight, the online memory's last
    states: Layers  # per layer [b, n, h, out, in], after each segment's last token
    pools: Array  # [b, n, h, k], the pooled key of each segment
    # Under `fenwick` index i of these three is the bucket of 2^i blocks: of each token, and after
    # the last whole block; 0 where there is none.
    lengths: Array  # [b, n], number of unmasked tokens of each segment or bucket
    normalizers: Array | None  # [b, n, h, k], normalised linear memories only
    momentum: Layers | None  # per layer [b, h, out, in], after the last token; titans only


class Memory(NamedTuple):
    """Weights of a memory, and its normalizer."""

    weights: Layers
    normalizer: Array | None  # [k]


class State(NamedTuple):
    """State between two writes."""

    memory: Memory
    momentum: Layers | None
    previous: tuple[Array, Array] | None  # key [k] and value [v] of the last unmasked token
    target: Layers  # the weights that retention decays to, of an MLP memory


class Write(NamedTuple):
    """The coefficients of one write."""

    step: float = 1.0  # η; λ for swla
    retention: float = 1.0  # α
    momentum: float = 0.0  # β of titans
    previous: float = 0.0  # β of swla


def feature(x: Array, memory: MemoryConfig) -> Array:
    """Return φ(x): the identity, or `elu(x) + 1`, of x [k]."""
    if memory.feature_map == "identity":
        return x
    return np.array([x_i + 1.0 if x_i > 0.0 else math.exp(x_i) for x_i in x])


def read(memory: Memory, q: Array, config: MemoryConfig, norm: Norm = None) -> Array:
    """Return M(q) [v] for q [k]."""
    if config.kind in ("dla", "titans"):
        return mlp(memory.weights, q, config, norm)[0]
    (weight,) = memory.weights
    if config.kind in ("swla", "delta"):
        return weight @ q
    phi = feature(q, config)
    if not config.normalize:
        return weight @ phi
    return weight @ phi / max(memory.normalizer @ phi, NORMALIZER_FLOOR)  # equation 2


def start(weights: Layers, config: MemoryConfig) -> State:
    """Return the state before any token."""
    normalized = config.kind == "linear" and config.normalize
    return State(
        Memory(weights, np.zeros(weights[0].shape[1]) if normalized else None),
        tuple(np.zeros_like(w) for w in weights) if config.kind == "titans" else None,
        None,
        weights
        if getattr(config, "retention_target", "zero") == "initial"
        else tuple(np.zeros_like(w) for w in weights),
    )


def write(
    state: State, anchor: Layers, k: Array, v: Array, by: Write, config: MemoryConfig, norm: Norm
) -> State:
    """Write key k [k] and value v [v] of one unmasked token.

    Gradients are taken at `anchor`, the weights at the start of the token's chunk.
    """
    weights, normalizer = state.memory
    momentum = state.momentum
    if config.kind == "linear":  # equations 2 and 12
        phi = feature(k, config)
        weights = (by.retention * weights[0] + by.step * np.outer(v, phi),)
        if config.normalize:
            normalizer = by.retention * normalizer + by.step * phi
    elif config.kind == "swla":  # equations 26 and 28
        new = by.retention * weights[0] + by.step * np.outer(v, k)
        if state.previous is not None:
            k_before, v_before = state.previous
            new = new + by.previous * np.outer(v_before, k_before)
        weights = (new,)
    elif config.kind == "delta":  # arXiv:2412.06464
        kept = weights[0] @ (np.eye(len(k)) - by.step * np.outer(k, k))
        weights = (by.retention * kept + by.step * np.outer(v, k),)
    elif config.written_layers == "last":
        weights, momentum = write_last_layer(state, k, v, by, config)
    else:
        pairs = inner_gradient(anchor, k, v, config, norm)
        steps = [by.step * clipped(delta, a, config.inner_clip) for delta, a in pairs]
        if config.kind == "dla":  # equation 30
            changes = [-step for step in steps]
        else:  # equations 34 and 35, with the sign that descends
            changes = [by.momentum * s - step for s, step in zip(momentum, steps, strict=True)]
            momentum = tuple(changes)
        weights = tuple(
            target + by.retention * (w - target) + x
            for target, w, x in zip(state.target, weights, changes, strict=True)
        )
    return State(Memory(weights, normalizer), momentum, (k, v), state.target)


def end_chunk(state: State, anchor: Layers, decay: float, config: MemoryConfig) -> State:
    """Return the state after a chunk whose update is orthogonalized, if it is.

    `decay` is the product of the retention since the chunk's start, where the weights are `anchor`.
    """
    if getattr(config, "chunk_update", "sum") == "sum":
        return state
    kept = [t + decay * (w - t) for t, w in zip(state.target, anchor, strict=True)]
    pairs = zip(kept, state.memory.weights, strict=True)
    weights = tuple(base + orthogonalized(w - base) for base, w in pairs)
    return state._replace(memory=state.memory._replace(weights=weights))


def write_last_layer(
    state: State, k: Array, v: Array, by: Write, config: MemoryConfig
) -> tuple[Layers, Layers | None]:
    """Return the weights and the momentum after a write to the last layer, for every chunk size.

    With the L2 loss, the gradient of half the loss is taken at the memory after its decay.
    """
    weights, momentum = state.memory.weights, state.momentum
    decayed = state.target[-1] + by.retention * (weights[-1] - state.target[-1])
    delta, a = inner_gradient((*weights[:-1], decayed), k, v, config)[-1]
    change = -by.step * np.outer(delta / (2 if config.objective == "l2" else 1), a)
    if config.kind == "titans":
        change = by.momentum * momentum[-1] + (1 - by.momentum) * change
        momentum = (*momentum[:-1], change)
    return (*weights[:-1], decayed + change), momentum


def lengths_of(tokens: int, config: MCConfig, explicit: Sequence[int] | None = None) -> list[int]:
    """Return the lengths of the segments that cover `tokens` tokens."""
    if explicit is not None:
        if min(explicit) < 1 or sum(explicit) != tokens:
            raise ValueError(f"segment lengths {list(explicit)} do not cover {tokens} tokens")
        return [int(length) for length in explicit]
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        if config.segmentation in ("constant", "fenwick"):
            lengths.append(min(config.segment_size, left))
        else:  # logarithmic: the largest power of two that fits
            power = 1
            while 2 * power <= left:
                power *= 2
            lengths.append(power)
    return lengths


def chunk_ends(lengths: Sequence[int], config: MCConfig) -> set[int]:
    """Return the last token of each chunk; the last chunk may be open in a stream."""
    ends, begin = set(), 0
    for length in lengths:
        ends |= set(range(begin + config.chunk_size - 1, begin + length, config.chunk_size))
        begin += length
        ends.add(begin - 1)
    streams = list(lengths) == lengths_of(begin, config) and config.segmentation != "logarithmic"
    if streams and lengths[-1] % config.chunk_size and lengths[-1] < config.segment_size:
        ends.remove(begin - 1)
    return ends


def soup(memories: Sequence[Memory], gates: Array) -> Memory:
    """Return the memory whose every weight is the gated sum of that weight (equation 15)."""
    weights = tuple(
        sum(gate * w for gate, w in zip(gates, layer, strict=True))
        for layer in zip(*(memory.weights for memory in memories), strict=True)
    )
    if memories[0].normalizer is None:
        return Memory(weights, None)
    return Memory(weights, sum(g * m.normalizer for g, m in zip(gates, memories, strict=True)))


def aggregate(
    memories: Sequence[Memory], gates: Array, q: Array, config: MCConfig, norm: Norm = None
) -> Array:
    """Return the read [v] of q [k] over cached memories and the online one (equations 7, 9, 15)."""
    if config.aggregation == "soup":
        return read(soup(memories, gates), q, config.memory, norm)
    used = [(gate, m) for gate, m in zip(gates, memories, strict=True) if gate != 0.0]
    return sum(gate * read(m, q, config.memory, norm) for gate, m in used)


class _Head(NamedTuple):
    output: Array  # [t, v]
    gates: Array  # [t, n + 1]
    cached: list[Memory]  # n
    pools: list[Array]  # n, each [k]
    final: State
    lengths: list[int]  # n


class _Tokens(NamedTuple):
    q: Array  # [t, k], as k and u
    k: Array
    v: Array  # [t, v]
    u: Array | None
    mask: Array  # [t]
    writes: Sequence[Write]  # one per token


def _run_head(
    tokens: _Tokens,
    initial: Layers,
    lengths: Sequence[int],
    config: MCConfig,
    norm: Norm,
    score: tuple[float, float],
) -> _Head:
    """Run one head of one sequence; `score` is the gate bias and the temperature."""
    q, k, v, u, mask, writes = tokens
    width, fenwick = k.shape[1], config.segmentation == "fenwick"
    slots = len(lengths).bit_length() if fenwick else len(lengths)
    output, gates = np.zeros_like(v), np.zeros((len(v), slots + 1))
    ends = chunk_ends(lengths, config)
    blocks: list[Block] = []
    state = start(initial, config.memory)
    t = 0
    for length in lengths:
        if config.state_init_mode == "restart":
            state = start(initial, config.memory)
        cached = _cached(blocks, width, config)
        block = Block(state.memory, [], 1.0)
        for place in range(length):
            if place % config.chunk_size == 0:
                anchor, decay = state.memory.weights, 1.0
            if mask[t]:
                decay *= writes[t].retention
                state = write(state, anchor, k[t], v[t], writes[t], config.memory, norm)
                keys = [*block.keys, k[t]]
                block = Block(state.memory, keys, block.decay * writes[t].retention)
                pools = [*(bucket.pool for bucket in cached), pooled(keys, width, config)]
                levels = [*(1 + bucket.exponent for bucket in cached), 0] if fenwick else None
                weight = gates_of(None if u is None else u[t], pools, config, *score, levels)
                memories = [*(bucket.memory for bucket in cached), state.memory]
                output[t] = aggregate(memories, weight, q[t], config, norm)
                gates[t, [*(bucket.exponent for bucket in cached), -1]] = weight
            if t in ends:
                state = end_chunk(state, anchor, decay, config.memory)
                block = block._replace(memory=state.memory)
            t += 1
        blocks.append(block)
    if fenwick and lengths[-1] < config.segment_size:
        blocks.pop()  # a bucket has whole blocks only
    zeros = tuple(np.zeros_like(w) for w in state.memory.weights)
    empty = Memory(zeros, None if state.memory.normalizer is None else np.zeros(width))
    found = {bucket.exponent: bucket for bucket in _cached(blocks, width, config)}
    after = [found.get(i, Bucket(i, empty, np.zeros(width), 0)) for i in range(slots)]
    return _Head(
        output, gates, [x.memory for x in after], [x.pool for x in after], state,
        [x.length for x in after],
    )  # fmt: skip


def _cached(blocks: Sequence[Block], width: int, config: MCConfig) -> list[Bucket]:
    """Return what a token after these segments reads; `exponent` is the index of its gate."""
    if config.segmentation == "fenwick":
        return buckets_of(blocks, width, config)
    return [
        Bucket(i, block.memory, pooled(block.keys, width, config), len(block.keys))
        for i, block in enumerate(blocks)
    ]


def memory_caching(
    q: Array,
    k: Array,
    v: Array,
    u: Array | None,
    initial: tuple[Array, ...],
    coefficients: Any,
    config: MCConfig,
    *,
    mask: Array | None = None,
    segment_lengths: Sequence[int] | None = None,
    norm: tuple[Array, Array] | None = None,
    gate_bias: Array | None = None,
    temperature: Array | None = None,
) -> OracleResult:
    """Write and read every token of every head.

    Args:
        q, k: queries and keys [b, t, h, k].
        v: values [b, t, h, v].
        u: connectors [b, t, h, k]; None without gates, or for q where the config says so.
        initial: W_0, first layer first, each [h, out, in].
        coefficients: has `step`, `retention`, `momentum`, `previous`, each [b, t, h]; None stands
            for 1, 1, 0 and 0. For swla `step` is λ and `previous` is β.
        config: the layer; projections, convolution and norms around the memory are not done here.
        mask: [b, t], True for a real token.
        segment_lengths: explicit lengths in place of the config's segmentation.
        norm: gain and bias, each [h, v], of MLP memories with a layer norm.
        gate_bias: [h], added to the online memory's score; None = 0.
        temperature: [h], divisor of the scores; None = the config's, or 1 where that is learned.

    Raises:
        ValueError: u is missing where the aggregation has gates.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if u is None and config.gated:
        if not config.use_q_as_u:
            raise ValueError(f"aggregation {config.aggregation!r} needs u")
        u = q
    u = None if u is None else np.asarray(u, np.float64)
    initial = tuple(np.asarray(w, np.float64) for w in initial)
    batch, tokens, heads, _ = q.shape
    mask = np.ones((batch, tokens), bool) if mask is None else np.asarray(mask, bool)
    lengths = lengths_of(tokens, config, segment_lengths)
    given = {name: getattr(coefficients, name) for name in Write._fields}
    given = {name: np.asarray(x, np.float64) for name, x in given.items() if x is not None}

    if temperature is None:
        learned = config.softmax_temperature == "learned"
        temperature = np.full(heads, 1.0 if learned else config.softmax_temperature)
    gate_bias = np.zeros(heads) if gate_bias is None else np.asarray(gate_bias, np.float64)

    def run(b: int, h: int) -> _Head:
        each = _Tokens(
            *(x[b, :, h] for x in (q, k, v)),
            None if u is None else u[b, :, h],
            mask[b],
            [Write(**{name: x[b, t, h] for name, x in given.items()}) for t in range(tokens)],
        )
        return _run_head(
            each,
            tuple(w[h] for w in initial),
            lengths,
            config,
            None if norm is None else tuple(np.asarray(x, np.float64)[h] for x in norm),
            (gate_bias[h], temperature[h]),
        )

    runs = [[run(b, h) for h in range(heads)] for b in range(batch)]

    def stack(pick: Callable[[_Head], Any]) -> Array:  # [b, h, ...]
        return np.array([[pick(head) for head in row] for row in runs])

    def states(layer: int) -> Array:
        return stack(lambda head: [m.weights[layer] for m in head.cached]).swapaxes(1, 2)

    memory = config.memory
    last_only = getattr(memory, "written_layers", "all") == "last"
    layers = range(len(initial) - 1 if last_only else 0, len(initial))
    normalized = memory.kind == "linear" and memory.normalize
    normalizers = stack(lambda head: [m.normalizer for m in head.cached])
    return OracleResult(
        output=stack(lambda head: head.output).swapaxes(1, 2),
        gates=stack(lambda head: head.gates).swapaxes(1, 2),
        states=tuple(states(layer) for layer in layers),
        pools=stack(lambda head: head.pools).swapaxes(1, 2),
        normalizers=normalizers.swapaxes(1, 2) if normalized else None,
        momentum=tuple(stack(lambda head, i=i: head.final.momentum[i]) for i in layers)
        if memory.kind == "titans"
        else None,
        lengths=stack(lambda head: head.lengths)[:, 0],
    )
