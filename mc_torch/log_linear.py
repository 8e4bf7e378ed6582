"""Log-linear attention (Guo et al., arXiv:2506.04761) in three forms, and its stream.

    o_t = Σ_{s<=t} λ_t^{ℓ(t,s)} (α_{s+1} ... α_t) <q_t, k_s> v_s        ℓ(t,s) = bit_length(t XOR s)

Seen from token t, earlier tokens fall into blocks of 2^i tokens with level i + 1, the newest block
being the smallest. Dimension l: levels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mc_core.log_linear import MAX_LEVELS, check_log_linear, level_slices
from mc_torch.backends.base import decay_products
from mc_torch.numerics import (
    Array,
    einsum_f32,
    expand_leading_dims,
    is_static,
    scale_rows,
    state_dtype,
    unstack,
)


class LevelTokens(NamedTuple):
    """Inputs of log-linear attention; `prepare_tokens` moves heads to axis 1."""

    q: Array  # queries [b, t, h, k]
    k: Array  # keys [b, t, h, k]
    v: Array  # values [b, t, h, v]
    level_weights: Array  # λ [b, t, h, l]
    retention: Array  # α [b, t, h]


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
    y = y.transpose(1, 2)
    if mask is not None:
        y = torch.where(mask[:, :, None, None], y, torch.zeros_like(y))
    return y.to(v.dtype)


def prepare_tokens(tokens: LevelTokens, mask: Array | None) -> LevelTokens:
    """Move heads to axis 1 [b, h, t, ...], and remove writes and decay of masked tokens [b, t].

    q, k and v get the dtype of q, level weights and retention its state dtype.
    """
    q, k, v, level_weights, retention = tokens
    dtype = state_dtype(q.dtype)
    k, v = k.to(q.dtype), v.to(q.dtype)
    level_weights, retention = level_weights.to(dtype), retention.to(dtype)
    if mask is not None:
        # Values at masked tokens may be NaN, which a mask applied after a product would not remove.
        here = mask[:, :, None]
        q, k, v, level_weights = (
            torch.where(here[..., None], x, torch.zeros_like(x)) for x in (q, k, v, level_weights)
        )
        retention = torch.where(here, retention, torch.ones_like(retention))
    return LevelTokens(*(x.transpose(1, 2) for x in (q, k, v, level_weights, retention)))


def final_state(tokens: LevelTokens) -> Array:
    """Return the states after the last token, one per level [b, h, l, v, k].

    Args:
        tokens: [b, h, t, ...], from `prepare_tokens`.
    """
    _, k, v, _, retention = tokens
    later = _log(retention[..., 1:]).flip(-1).cumsum(dim=-1).flip(-1)
    decay = torch.exp(F.pad(later, (0, 1)))
    blocks = dict(level_slices(k.shape[2]))
    states = []
    for level in range(max(blocks) + 1):
        here = blocks.get(level, slice(0, 0))
        scaled = scale_rows(decay[..., here], v[:, :, here])
        states.append(einsum_f32("...cv,...ck->...vk", scaled, k[:, :, here], dtype=k.dtype))
    return torch.stack(states, dim=2)


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
    outputs, left = [], count
    for chunk in unstack(LevelTokens(*(_split(x, chunks, chunk_size) for x in tokens)), 2):
        here = left.clamp(max=chunk_size)
        y, state = _extend_chunk(chunk, state, position + count - left, here)
        outputs.append(y)
        left = left - here
    return torch.cat(outputs, dim=2)[:, :, :t], state


def _dense(tokens: LevelTokens) -> Array:
    """Return the outputs [b, h, t, v] from all pairs of tokens: the definition."""
    q, k, v, level_weights, retention = tokens
    scores = einsum_f32("...ck,...sk->...cs", q, k)
    decay = decay_products(retention)[..., 1:]
    weights = scores * decay * _by_level(level_weights, _pair_levels(q.shape[2], q.device))
    return einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)


def _recurrent(tokens: LevelTokens) -> Array:
    """Return the outputs [b, h, t, v], token by token, with one state per level."""
    (b, h, _, width), dtype = tokens.q.shape, state_dtype(tokens.q.dtype)
    levels, values = tokens.level_weights.shape[-1], tokens.v.shape[-1]
    state = tokens.q.new_zeros(b, h, levels, values, width, dtype=dtype)
    outputs = []
    for token, (q, k, v, level_weights, retention) in enumerate(unstack(tokens, 2)):
        level = torch.full((1,), (token ^ max(token - 1, 0)).bit_length(), device=q.device)
        state = _carry(state, level) * retention[:, :, None, None, None]
        write = einsum_f32("...v,...k->...vk", v.to(dtype), k.to(dtype))
        state = torch.cat([write[:, :, None], state[:, :, 1:]], dim=2)
        reads = einsum_f32("...lvk,...k->...lv", state, q, dtype=q.dtype)
        outputs.append(einsum_f32("...l,...lv->...v", level_weights, reads))
    return torch.stack(outputs, dim=2)


def _chunked(tokens: LevelTokens, chunk_size: int) -> Array:
    """Return the outputs [b, h, t, v]: dense within chunks, and a tree of states between them.

    The states of chunks are the leaves of a binary tree. A node is the state after its chunks. In
    level i of the tree, all chunks below a right node read its left sibling, with the level weight
    `log2(c) + 1 + i`.
    """
    t = tokens.q.shape[2]
    c = min(chunk_size, 1 << (t - 1).bit_length())
    chunks = -(-t // c)
    q, k, v, level_weights, retention = (_split(x, chunks, c) for x in tokens)
    decay = decay_products(retention)
    weights = einsum_f32("...ck,...sk->...cs", q, k) * decay[..., 1:]
    weights = weights * _by_level(level_weights, _pair_levels(c, q.device))
    y = einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)

    to_end = scale_rows(decay[..., -1, 1:], v)
    nodes = einsum_f32("...cv,...ck->...vk", to_end, k, dtype=q.dtype)  # [b, h, g, v, k]
    products = decay[..., -1, 0]  # retention over all tokens of a node [b, h, g]
    since = decay[..., 0]  # decay since the first token of the token's node [b, h, g, c]
    for i in range((chunks - 1).bit_length()):
        scale = since * level_weights[..., c.bit_length() + i]
        y = y + _read_siblings(scale, q, nodes, 1 << i)
        since = since * _sibling_products(products, 1 << i, chunks)[..., None]
        pairs = chunks >> (i + 1)
        left, right = nodes[:, :, : 2 * pairs : 2], nodes[:, :, 1 : 2 * pairs : 2]
        decay_right = products[:, :, 1 : 2 * pairs : 2]
        nodes = right + decay_right[..., None, None] * left
        products = decay_right * products[:, :, : 2 * pairs : 2]
    return y.reshape(*y.shape[:2], chunks * c, y.shape[-1])[:, :, :t]


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

        scaled = scale_rows(below_right(scale), below_right(q))
        read = einsum_f32("...ck,...vk->...cv", scaled, nodes[:, :, : 2 * pairs : 2], dtype=q.dtype)
        read = torch.stack([torch.zeros_like(read), read], dim=3)
        parts.append(read.reshape(b, h, 2 * pairs * size, c, read.shape[-1]))
    if between := chunks - 2 * pairs * size - last:
        parts.append(scale.new_zeros(b, h, between, c, nodes.shape[3]))
    if last:
        scaled = scale_rows(scale[:, :, -last:], q[:, :, -last:])
        node = nodes[:, :, 2 * pairs]
        parts.append(einsum_f32("bhgck,bhvk->bhgcv", scaled, node, dtype=q.dtype))
    return torch.cat(parts, dim=2)


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
    both = torch.stack([torch.ones_like(left), left], dim=3)[..., None]
    both = both.expand(b, h, pairs, 2, size).reshape(b, h, 2 * pairs * size)
    rest = max(chunks - 2 * pairs * size, 0)
    return F.pad(both, (0, rest), value=1.0)[:, :, :chunks]


def _extend_chunk(
    tokens: LevelTokens, state: Array, position: Array, count: Array
) -> tuple[Array, Array]:
    """Process the next tokens of a stream as one chunk; arguments as in `extend_levels`."""
    q, k, v, level_weights, retention = tokens
    number = expand_leading_dims(torch.arange(state.shape[2], device=q.device), 3)
    token = position[:, None] + expand_leading_dims(torch.arange(q.shape[2], device=q.device), 2)
    before = (position - 1).clamp(min=0)[:, None]
    last = (position + count - 1).clamp(min=0)[:, None]
    decay = decay_products(retention)  # [b, h, c, c + 1]
    pairs = _bit_length(token[:, :, None] ^ token[:, None])[:, None]
    weights = einsum_f32("...ck,...sk->...cs", q, k) * decay[..., 1:]
    weights = weights * _by_level(level_weights, pairs)
    y = einsum_f32("...cs,...sv->...cv", weights, v, dtype=q.dtype)

    # Seen from a later token, all states below the level of the token before the call have it.
    merged = _bit_length(token ^ before)[:, None, :, None]  # [b, 1, c, 1]
    at_merged = torch.sum(torch.where(number[..., None, :] == merged, level_weights, 0.0), -1)
    read = torch.where(number[..., None, :] < merged, at_merged[..., None], level_weights)
    scaled = scale_rows(read * decay[..., :1], q[..., None, :])  # [b, h, c, l, k]
    y = y + einsum_f32("...clk,...lvk->...cv", scaled, state, dtype=q.dtype)

    level = _bit_length(token ^ last)[:, None, None]  # of each token, from the last [b, 1, 1, c]
    share = torch.where(level == number[..., None], decay[:, :, None, -1, 1:], 0.0)  # [b, h, l, c]
    write = einsum_f32("...lcv,...ck->...lvk", scale_rows(share, v[:, :, None]), k, dtype=q.dtype)
    state = _carry(state, _bit_length(last ^ before)[:, 0])
    return y, state * decay[:, :, -1, :1, None, None] + write


def _carry(state: Array, level: Array) -> Array:
    """Move the sum of the states [b, h, l, v, k] below a level, integers [b], to that level."""
    number = expand_leading_dims(torch.arange(state.shape[2], device=state.device), 3)[
        ..., None, None
    ]
    level = level[:, None, None, None, None]
    below = torch.where(number < level, state, 0.0)
    merged = torch.sum(below, dim=2, keepdim=True)
    return state - below + torch.where(number == level, merged, 0.0)


def _by_level(level_weights: Array, levels: Array) -> Array:
    """Return the level weight of each pair of tokens, [..., c, s].

    Args:
        level_weights: [..., c, l].
        levels: integers [c, s], or [b, 1, c, s].
    """
    levels = expand_leading_dims(levels, level_weights.ndim)
    levels = levels.clamp(max=level_weights.shape[-1] - 1)
    return torch.gather(level_weights, -1, levels.expand(*level_weights.shape[:-1], -1))


def _pair_levels(tokens: int, device: torch.device) -> Array:
    """Return the level `bit_length(t XOR s)` of all pairs of tokens, [t, s]."""
    token = torch.arange(tokens, device=device)
    return _bit_length(token[:, None] ^ token)


def _log(retention: Array) -> Array:
    """Return the logarithm of the retention [...], finite also for a retention that underflows."""
    return torch.log(retention + torch.finfo(retention.dtype).tiny ** 0.75)


def _bit_length(x: Array) -> Array:
    """Return the number of bits of integers [...] from 0 to `2**30 - 1`, int64."""
    powers = 1 << torch.arange(MAX_LEVELS, device=x.device)
    return torch.sum(x[..., None] >= powers, dim=-1)


def _split(x: Array, chunks: int, size: int) -> Array:
    """Split tokens [b, h, t, ...] into chunks [b, h, g, c, ...], padded with zeros.

    Retention [b, h, t] is padded with ones.
    """
    rest = x.ndim - 3
    padding = (*[0] * (2 * rest), 0, chunks * size - x.shape[2])
    x = F.pad(x, padding, value=0.0 if rest else 1.0)
    return x.reshape(*x.shape[:2], chunks, size, *x.shape[3:])
