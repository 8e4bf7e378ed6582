"""Log-linear attention (Guo et al., arXiv:2506.04761) in three forms, and its stream.

    o_t = Σ_{s<=t} λ_t^{ℓ(t,s)} (α_{s+1} ... α_t) <q_t, k_s> v_s        ℓ(t,s) = bit_length(t XOR s)

Seen from token t, earlier tokens fall into blocks of 2^i tokens with level i + 1, the newest block
being the smallest. Dimension l: levels.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.log_linear import check_log_linear, level_slices, pair_levels
from mc_jax.backends.base import decay_products
from mc_jax.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    is_static,
    scale_rows,
    state_dtype,
)

_BLOCK = 4096  # perf(cpu): tokens per block of long sequences, to fit in the CPU cache


class LevelTokens(NamedTuple):
    """Inputs of log-linear attention; `prepare_tokens` moves heads to axis 1."""

    q: Array  # queries [b, t, h, k]
    k: Array  # keys [b, t, h, k]
    v: Array  # values [b, t, h, v]
    level_weights: Array  # λ [b, t, h, l]
    retention: Array  # α [b, t, h]


class _Tree(NamedTuple):
    """States of nodes of a binary tree over tokens."""

    nodes: Array  # state after the tokens of each node [b, h, n, v, k]
    products: Array  # retention over all tokens of each node [b, h, n]
    since: Array  # decay since the first token of the token's node [b, h, g, c]


def log_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    level_weights: Array,
    retention: Array,
    *,
    mask: Array | None = None,
    method: str = "chunked",
    chunk_size: int = 64,
) -> Array:
    """Linear attention with a weight per level and decay.

    Args:
        q: queries [b, t, h, k].
        k: keys [b, t, h, k].
        v: values [b, t, h, v].
        level_weights: λ >= 0 [b, t, h, l]; level 0 is the token itself. At least
            `bit_length(t - 1) + 1` levels.
        retention: α in (0, 1] [b, t, h].
        mask: bool [b, t], False at masked tokens. They keep their position, are not written, do not
            decay the states, and have output 0.
        method: `dense`, the definition, with all pairs of tokens; `recurrent`, one token at a time;
            or `chunked`, with work `t c + t log(t / c)`. All give the same result.
        chunk_size: tokens per chunk of `chunked`, a power of two.

    Returns:
        [b, t, h, v] in the dtype of `v`. Level weights, retention, its products and the states are
        at least float32; products have operands in the dtype of `q`.

    Raises:
        ValueError: an argument has a wrong shape, there are too few levels, or a name is unknown.
    """
    tokens = LevelTokens(q, k, v, level_weights, retention)
    check_log_linear(tokens._asdict(), mask, method, chunk_size, is_static)
    tokens = prepare_tokens(tokens, mask)
    if method == "dense":
        y = _dense(tokens)
    elif method == "recurrent":
        y = _recurrent(tokens)
    else:
        y = _chunked(tokens, chunk_size)
    y = y.swapaxes(1, 2)
    if mask is not None:
        y = jnp.where(mask[:, :, None, None], y, jnp.zeros_like(y))
    return y.astype(v.dtype)


def prepare_tokens(tokens: LevelTokens, mask: Array | None) -> LevelTokens:
    """Move heads to axis 1 [b, h, t, ...], and remove writes and decay of masked tokens [b, t].

    q, k and v get the dtype of q, level weights and retention its state dtype.
    """
    q, k, v, level_weights, retention = tokens
    dtype = state_dtype(q.dtype)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    level_weights, retention = level_weights.astype(dtype), retention.astype(dtype)
    if mask is not None:
        # Values at masked tokens may be NaN, which a mask applied after a product would not remove.
        here = mask[:, :, None]
        q, k, v, level_weights = (
            jnp.where(here[..., None], x, jnp.zeros_like(x)) for x in (q, k, v, level_weights)
        )
        retention = jnp.where(here, retention, jnp.ones_like(retention))
    return LevelTokens(*(x.swapaxes(1, 2) for x in (q, k, v, level_weights, retention)))


def final_state(tokens: LevelTokens) -> Array:
    """Return the states after the last token, one per level [b, h, l, v, k].

    Args:
        tokens: [b, h, t, ...], from `prepare_tokens`.
    """
    _, k, v, _, retention = tokens
    later = jnp.flip(jnp.cumsum(jnp.flip(_log(retention[..., 1:]), -1), axis=-1), -1)
    decay = jnp.exp(jnp.pad(later, [(0, 0), (0, 0), (0, 1)]))
    blocks = dict(level_slices(k.shape[2]))
    states = []
    for level in range(max(blocks) + 1):
        here = blocks.get(level, slice(0, 0))
        scaled = scale_rows(decay[..., here], v[:, :, here])
        states.append(einsum_f32("...cv,...ck->...vk", scaled, k[:, :, here], dtype=k.dtype))
    return jnp.stack(states, axis=2)


@partial(jax.jit, static_argnames="chunk_size")
def extend_levels(
    tokens: LevelTokens, state: Array, position: Array, count: Array, *, chunk_size: int
) -> tuple[Array, Array]:
    """Process the next tokens of a stream, chunk by chunk.

    Args:
        tokens: [b, h, t, ...], from `prepare_tokens` with padding masked. At least as many levels
            as states.
        state: states before these tokens [b, h, l, v, k].
        position: number of processed tokens per row, int32 [b].
        count: number of tokens per row, int32 [b]; later tokens are padding.
        chunk_size: maximum number of tokens per chunk.

    Returns:
        the outputs [b, h, t, v], and the states after these tokens.
    """
    tokens = tokens._replace(level_weights=tokens.level_weights[..., : state.shape[2]])
    t = tokens.q.shape[2]
    if t <= chunk_size:
        return _extend_chunk(tokens, state, position, count)
    chunks = -(-t // chunk_size)
    split = LevelTokens(*(jnp.moveaxis(_split(x, chunks, chunk_size), 2, 0) for x in tokens))

    def step(carry: tuple[Array, Array], chunk: LevelTokens) -> tuple[Any, Array]:
        state, left = carry
        here = jnp.minimum(left, chunk_size)
        y, state = _extend_chunk(chunk, state, position + count - left, here)
        return (state, left - here), y

    (state, _), y = jax.lax.scan(step, (state, count), split)
    y = jnp.moveaxis(y, 0, 2)
    return y.reshape(*y.shape[:2], chunks * chunk_size, y.shape[-1])[:, :, :t], state


def _dense(tokens: LevelTokens) -> Array:
    """Return the outputs [b, h, t, v] from all pairs of tokens: the definition."""
    q, k, v, level_weights, retention = tokens
    scores = einsum_f32("...ck,...sk->...cs", q, k)
    decay = decay_products(retention)[..., 1:]
    levels = jnp.asarray(pair_levels(q.shape[2]))
    weights = scores * decay * _by_level(level_weights, levels)
    return einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)


def _recurrent(tokens: LevelTokens) -> Array:
    """Return the outputs [b, h, t, v], token by token, with one state per level."""
    q, k, v, level_weights, _ = tokens
    (b, h, t, _), dtype, levels = q.shape, state_dtype(q.dtype), level_weights.shape[-1]

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        token, q, k, v, weights, retention = inputs
        state = _carry(state, _bit_length(token ^ jnp.maximum(token - 1, 0))[None])
        state = state * retention[:, :, None, None, None]
        write = einsum_f32("...v,...k->...vk", v.astype(dtype), k.astype(dtype))
        state = jnp.concatenate([write[:, :, None], state[:, :, 1:]], axis=2)
        reads = einsum_f32("...lvk,...k->...lv", state, q, dtype=q.dtype)
        return state, einsum_f32("...l,...lv->...v", weights, reads)

    # The zeros are derived from the inputs, so that the carry has the inputs' sharding.
    zero = jnp.zeros_like(v[:, :, :1, :, None] * k[:, :, :1, None], dtype=dtype)
    start = jnp.broadcast_to(zero, (b, h, levels, *zero.shape[3:]))
    rows = (jnp.moveaxis(x, 2, 0) for x in tokens)
    _, y = jax.lax.scan(step, start, (jnp.arange(t, dtype=jnp.int32), *rows))
    return jnp.moveaxis(y, 0, 2)


def _chunked(tokens: LevelTokens, chunk_size: int) -> Array:
    """Return the outputs [b, h, t, v]: dense within chunks, and a tree of states between them.

    Long sequences are split into blocks with a tree each, whose roots are the leaves of a tree.
    """
    t = tokens.q.shape[2]
    c = min(chunk_size, 1 << (t - 1).bit_length())
    if t < 4 * _BLOCK or c >= _BLOCK:
        return _chunk_tree(tokens, c)[0][:, :, :t]
    blocks = LevelTokens(*(_split(x, -(-t // _BLOCK), _BLOCK) for x in tokens))

    @jax.checkpoint
    def run_block(block: LevelTokens) -> tuple[Array, _Tree]:
        y, tree = _chunk_tree(block, c)
        since = tree.since.reshape(y.shape[:3])
        return y, _Tree(tree.nodes[:, :, 0], tree.products[:, :, 0], since)

    ys, trees = jax.lax.map(run_block, LevelTokens(*(jnp.moveaxis(x, 2, 0) for x in blocks)))
    y, tree = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), (ys, trees))
    y, _ = _add_levels(y, blocks, tree)
    return _merge_leaves(y)[:, :, :t]


def _chunk_tree(tokens: LevelTokens, c: int) -> tuple[Array, _Tree]:
    """Return the outputs of tokens [b, h, t, ...], padded to chunks of c tokens, and their tree."""
    chunks = LevelTokens(*(_split(x, -(-tokens.q.shape[2] // c), c) for x in tokens))
    q, k, v, level_weights, retention = chunks
    decay = decay_products(retention)
    weights = einsum_f32("...ck,...sk->...cs", q, k) * decay[..., 1:]
    weights = weights * _by_level(level_weights, pair_levels(c))
    y = einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)
    to_end = _scale(decay[..., -1, 1:], v)
    nodes = einsum_f32("...cv,...ck->...vk", to_end, k, dtype=q.dtype)
    y, tree = _add_levels(y, chunks, _Tree(nodes, decay[..., -1, 0], decay[..., 0]))
    return _merge_leaves(y), tree


def _add_levels(y: Array, leaves: LevelTokens, tree: _Tree) -> tuple[Array, _Tree]:
    """Add the reads between the leaves of a tree, chunks or blocks, to the outputs of its tokens.

    A node is the state after its leaves. In level i of the tree, all leaves below a right node read
    its left sibling, with the level weight `log2(c) + 1 + i`.

    Args:
        y: outputs from the leaf of each token [b, h, g, c, v].
        leaves: tokens [b, h, g, c, ...].
        tree: the states of the leaves.

    Returns:
        the outputs, and the root; its states are complete if the number of leaves is a power of 2.
    """
    nodes, products, since = tree
    count, c = leaves.q.shape[2:4]
    for i in range((count - 1).bit_length()):
        scale = since * leaves.level_weights[..., c.bit_length() + i]
        y = y + _read_siblings(scale, leaves.q, nodes, 1 << i)
        since = since * _sibling_products(products, 1 << i, count)[..., None]
        pairs = count >> (i + 1)
        left, right = nodes[:, :, : 2 * pairs : 2], nodes[:, :, 1 : 2 * pairs : 2]
        decay_right = products[:, :, 1 : 2 * pairs : 2]
        nodes = right + decay_right[..., None, None] * left
        products = decay_right * products[:, :, : 2 * pairs : 2]
    return y, _Tree(nodes, products, since)


def _read_siblings(scale: Array, q: Array, nodes: Array, size: int) -> Array:
    """Return the reads [b, h, g, c, v] of left siblings by all tokens below right nodes.

    Args:
        scale: weight of the read per token [b, h, g, c].
        q: queries [b, h, g, c, k].
        nodes: complete nodes of a level of the tree [b, h, n, v, k].
        size: number of chunks per node.
    """
    b, h, chunks, c, _ = q.shape
    pairs = chunks // (2 * size)  # with complete right nodes
    last = max(chunks - (2 * pairs + 1) * size, 0)  # chunks below an incomplete right node
    parts = []
    if pairs:

        def below_right(x: Array) -> Array:
            x = x[:, :, : 2 * pairs * size]
            return x.reshape(b, h, pairs, 2, size * c, *x.shape[4:])[:, :, :, 1]

        scaled = _scale(below_right(scale), below_right(q))
        read = einsum_f32("...ck,...vk->...cv", scaled, nodes[:, :, : 2 * pairs : 2], dtype=q.dtype)
        read = jnp.stack([jnp.zeros_like(read), read], axis=3)
        parts.append(read.reshape(b, h, 2 * pairs * size, c, read.shape[-1]))
    if between := chunks - 2 * pairs * size - last:
        parts.append(jnp.zeros((b, h, between, c, nodes.shape[3]), scale.dtype))
    if last:
        scaled = _scale(scale[:, :, -last:], q[:, :, -last:])
        node = nodes[:, :, 2 * pairs]
        parts.append(einsum_f32("bhgck,bhvk->bhgcv", scaled, node, dtype=q.dtype))
    return jnp.concatenate(parts, axis=2)


def _sibling_products(products: Array, size: int, chunks: int) -> Array:
    """Return the retention over the left sibling of each chunk's node [b, h, g]; 1 if it is left.

    Args:
        products: retention over complete nodes [b, h, n].
        size: number of chunks per node.
        chunks: g.
    """
    b, h, _ = products.shape
    pairs = (chunks + size - 1) // (2 * size)  # with chunks below the right node
    left = products[:, :, : 2 * pairs : 2]
    both = jnp.stack([jnp.ones_like(left), left], axis=3)[..., None]
    both = jnp.broadcast_to(both, (b, h, pairs, 2, size)).reshape(b, h, 2 * pairs * size)
    rest = max(chunks - 2 * pairs * size, 0)
    return jnp.pad(both, [(0, 0), (0, 0), (0, rest)], constant_values=1)[:, :, :chunks]


def _extend_chunk(
    tokens: LevelTokens, state: Array, position: Array, count: Array
) -> tuple[Array, Array]:
    """Process the next tokens of a stream as one chunk; arguments as in `extend_levels`."""
    q, k, v, level_weights, retention = tokens
    number = expand_leading_dims(jnp.arange(state.shape[2], dtype=jnp.int32), 3)
    token = position[:, None] + expand_leading_dims(jnp.arange(q.shape[2], dtype=jnp.int32), 2)
    before = jnp.maximum(position - 1, 0)[:, None]
    last = jnp.maximum(position + count - 1, 0)[:, None]
    decay = decay_products(retention)  # [b, h, c, c + 1]
    pairs = _bit_length(token[:, :, None] ^ token[:, None])[:, None]
    weights = einsum_f32("...ck,...sk->...cs", q, k) * decay[..., 1:]
    weights = weights * _by_level(level_weights, pairs)
    y = einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)

    # Seen from a later token, all states below the level of the token before the call have it.
    merged = _bit_length(token ^ before)[:, None, :, None]  # [b, 1, c, 1]
    at_merged = jnp.sum(jnp.where(number[..., None, :] == merged, level_weights, 0), -1)
    read = jnp.where(number[..., None, :] < merged, at_merged[..., None], level_weights)
    scaled = scale_rows(read * decay[..., :1], q[..., None, :])  # [b, h, c, l, k]
    y = y + einsum_f32("...clk,...lvk->...cv", scaled, state, dtype=q.dtype)

    level = _bit_length(token ^ last)[:, None, None]  # of each token, from the last [b, 1, 1, c]
    share = jnp.where(level == number[..., None], decay[:, :, None, -1, 1:], 0)  # [b, h, l, c]
    write = einsum_f32("...lcv,...ck->...lvk", scale_rows(share, v[:, :, None]), k, dtype=q.dtype)
    state = _carry(state, _bit_length(last ^ before)[:, 0])
    return y, state * decay[:, :, -1, :1, None, None] + write


def _carry(state: Array, level: Array) -> Array:
    """Move the sum of the states [b, h, l, v, k] below a level, int32 [b], to that level."""
    number = expand_leading_dims(jnp.arange(state.shape[2], dtype=jnp.int32), 3)[..., None, None]
    level = level[:, None, None, None, None]
    below = jnp.where(number < level, state, 0)
    merged = jnp.sum(below, axis=2, keepdims=True)
    return state - below + jnp.where(number == level, merged, 0)


def _by_level(level_weights: Array, levels: Any) -> Array:
    """Return the level weight of each pair of tokens, [..., c, s].

    Args:
        level_weights: [..., c, l].
        levels: int32 [c, s] or [b, 1, c, s]; a NumPy array if known and small.
    """
    # The gradient of a gather would be a scatter, and that of selections would sum over rows.
    if isinstance(levels, np.ndarray):
        used = int(levels.max()) + 1
        one_hot = jnp.asarray(levels[..., None] == np.arange(used), level_weights.dtype)
        return einsum_f32("...cl,csl->...cs", level_weights[..., :used], one_hot, exact=True)
    levels = expand_leading_dims(levels, level_weights.ndim)
    every = enumerate(jnp.moveaxis(level_weights, -1, 0))
    parts = [jnp.where(levels == i, weights[..., None], 0) for i, weights in every]
    return sum(parts[1:], parts[0])


def _scale(scale: Array, x: Array) -> Array:
    """Return `scale[..., None] * x` in the dtype of `scale` [..., c]; x is [..., c, i]."""
    # XLA is slow at the row sums of its gradient, unless they are a product.
    return einsum_f32("...c,...ci->...ci", scale, x.astype(scale.dtype), exact=True)


def _log(retention: Array) -> Array:
    """Return the logarithm of the retention [...], finite also for a retention that underflows."""
    return jnp.log(retention + float(jnp.finfo(retention.dtype).tiny) ** 0.75)


def _bit_length(x: Array) -> Array:
    """Return the number of bits of int32 numbers [...]."""
    return 32 - jax.lax.clz(x)


def _merge_leaves(y: Array) -> Array:
    """Reshape outputs [b, h, g, c, v] to [b, h, g c, v]."""
    return y.reshape(*y.shape[:2], y.shape[2] * y.shape[3], y.shape[4])


def _split(x: Array, chunks: int, size: int) -> Array:
    """Split tokens [b, h, t, ...] into chunks [b, h, g, c, ...], padded with zeros.

    Retention [b, h, t] is padded with ones.
    """
    rest = [(0, 0)] * (x.ndim - 3)
    padding = [(0, 0), (0, 0), (0, chunks * size - x.shape[2]), *rest]
    x = jnp.pad(x, padding, constant_values=0 if rest else 1)
    return x.reshape(*x.shape[:2], chunks, size, *x.shape[3:])
