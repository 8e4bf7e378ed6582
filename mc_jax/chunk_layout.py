"""Rearrangement of tokens into chunks and segments for parallel computation.

Full sequences follow a static `Plan`. A stream may be split anywhere and its rows may have
different positions, so the chunks of a call depend on dynamic positions. Their number is static: it
is the maximum number of chunks that a call of this length can span.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mc_core.chunk_layout import call_shape
from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.numerics import Array, expand_leading_dims


def gather_tokens(x: Array, index: np.ndarray) -> Array:
    """Gather tokens [b, len(index), ...] of `x` [b, t, ...]; zeros where the index is t."""
    tokens = x.shape[1]
    if np.array_equal(index, np.arange(tokens)):
        return x
    if index.max() == tokens:
        x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    return jnp.take(x, index, axis=1)


def to_chunks(x: Array, plan: Plan) -> Array:
    """Rearrange `x` [b, t, h, ...] into r rows of g chunks: [g, b, r, h, c, ...]."""
    b, _, h, *rest = x.shape
    chunks = plan.restarts.shape[1]
    x = gather_tokens(x, plan.chunk_tokens)
    x = x.reshape(b, plan.rows, chunks, plan.chunk_size, h, *rest)
    return x.transpose(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_chunks(x: Array, plan: Plan) -> Array:
    """Undo `to_chunks` for [g, b, r, h, c, v]; drops padding."""
    x = x.transpose(1, 2, 0, 4, 3, 5)
    b, r, g, c, h, width = x.shape
    return gather_positions(x.reshape(b, r * g * c, h, width), plan.chunk_positions)


def to_segments(x: Array, plan: Plan) -> Array:
    """Rearrange `x` [b, t, h, ...] into segments [b, h, n, c, ...], padded to the longest."""
    b, _, h, *rest = x.shape
    index = plan.segment_tokens
    x = gather_tokens(x, index.reshape(-1)).reshape(b, *index.shape, h, *rest)
    return x.transpose(0, 3, 1, 2, *range(4, x.ndim))


def from_segments(x: Array, plan: Plan) -> Array:
    """Undo `to_segments` for [b, h, n, c, v]; drops padding."""
    b, h, n, c, width = x.shape
    return gather_positions(
        x.transpose(0, 2, 3, 1, 4).reshape(b, n * c, h, width), plan.segment_positions
    )


def gather_positions(x: Array, positions: np.ndarray) -> Array:
    """Gather x [b, p, ...] at `positions` [t]: [b, t, ...]."""
    if np.array_equal(positions, np.arange(x.shape[1])):
        return x
    return jnp.take(x, positions, axis=1)


class CallLayout(NamedTuple):
    """Assignment of the tokens of a call to consecutive chunks, for each row."""

    chunk_tokens: Array  # token at each position of the chunks, int32 [b, g, c]; t = none
    chunk_positions: Array  # position of each token in the chunks, int32 [b, t]; g * c = none
    segment: Array  # segment of each token, int32 [b, t]
    has_first_token: Array  # bool [g, b, 1], True if the call contains the chunk's first token
    completes_chunk: Array  # bool [g, b, 1], True if the call contains the chunk's last token
    starts_segment: Array  # bool [g, b, 1], True if this token is also the first of a segment
    completes_segment: Array  # bool [g, b, 1], True if the chunk completes a segment
    completing_chunk: Array  # chunks that complete the next s segments, int32 [b, s]
    completed_slots: Array  # slots of these segments, int32 [b, s]; out of range if incomplete
    slot: Array  # segment of the row's last token after the call, int32 [b]


def make_call_layout(position: Array, count: Array, tokens: int, config: MCConfig) -> CallLayout:
    """Assign the tokens of a call to chunks.

    Example: segments of 4, chunks of 3, t = 8, and a row with 5 tokens before this call. `end`
    marks the last token of a segment:

        position        5  6 | 7 end | 8  9  10 | 11 end | 12
        token           0  1 | 2     | 3  4  5  | 6      | 7
        chunk           2    | 3     | 4        | 5      | 6

        chunk_tokens      = [[0, 1, 8], [2, 8, 8], [3, 4, 5], [6, 8, 8], [7, 8, 8]]
        chunk_positions   = [0, 1, 3, 6, 7, 8, 9, 12]
        segment           = [1, 1, 1, 2, 2, 2, 2, 3], slot = 3
        has_first_token   = [F, T, T, T, T]
        completes_chunk   = [T, T, T, T, F]
        starts_segment    = [F, F, T, F, T]
        completes_segment = [F, T, F, T, F]
        completing_chunk  = [1, 3], completed_slots = [1, 2]

    Args:
        position: number of processed tokens per row before the call, int32 [b].
        count: number of tokens of the call per row, int32 [b]; later tokens are padding.
        tokens: t, the length of the call.
        config: segment and chunk size.
    """
    shape = call_shape(tokens, config)
    size, per_segment, width = shape.segment, shape.per_segment, shape.width
    position, count = position[:, None], count[:, None]

    # Chunks [b, g]; begin, end and stop are relative to the call's first token.
    first = shape.chunk_index(position)
    chunk = first + _range(shape.chunks, 2)
    begin = shape.chunk_start(chunk) - position
    end = shape.chunk_start(chunk + 1) - position
    stop = jnp.minimum(end, count)
    first_here = jnp.maximum(begin, 0)  # the call's first token in the chunk
    chunk_tokens = first_here[..., None] + _range(width, 3)
    chunk_tokens = jnp.where(chunk_tokens < stop[..., None], chunk_tokens, tokens)
    has_first_token = (begin >= 0) & (begin < stop)
    completes_chunk = end <= count

    # Tokens [b, t].
    token = _range(tokens, 2)
    positions = position + token
    ordinal = shape.chunk_index(positions) - first
    chunk_positions = ordinal * width + token - jnp.take_along_axis(first_here, ordinal, axis=1)
    chunk_positions = jnp.where(token < count, chunk_positions, shape.chunks * width)

    # Segments that the call may complete [b, s].
    following = position // size + _range(shape.completed, 2)
    complete = (following + 1) * size <= position + count
    last = (following + 1) * per_segment - 1 - first

    def chunks_first(x: Array) -> Array:
        return x.T[..., None]

    return CallLayout(
        chunk_tokens=chunk_tokens,
        chunk_positions=chunk_positions,
        segment=positions // size,
        has_first_token=chunks_first(has_first_token),
        completes_chunk=chunks_first(completes_chunk),
        starts_segment=chunks_first(has_first_token & (chunk % per_segment == 0)),
        completes_segment=chunks_first(completes_chunk & (chunk % per_segment == per_segment - 1)),
        completing_chunk=jnp.clip(last, 0, shape.chunks - 1),
        completed_slots=jnp.where(complete, following, np.iinfo(np.int32).max),
        slot=jnp.maximum(position + count - 1, 0)[:, 0] // size,
    )


def to_call_chunks(x: Array, layout: CallLayout) -> Array:
    """Rearrange `x` [b, t, h, ...] into [g, b, 1, h, c, ...]; zeros where there is no token."""
    b, chunks, width = layout.chunk_tokens.shape
    x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    x = _gather(x, layout.chunk_tokens.reshape(b, -1)).reshape(b, 1, chunks, width, *x.shape[2:])
    return x.transpose(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_call_chunks(x: Array, layout: CallLayout) -> Array:
    """Undo `to_call_chunks` for [g, b, 1, h, c, v]; zeros where there is no token."""
    chunks, b, _, h, width, features = x.shape
    x = x.transpose(1, 2, 0, 4, 3, 5).reshape(b, chunks * width, h, features)
    return _gather(jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1), layout.chunk_positions)


def first_tokens(count: Array, tokens: int) -> Array:
    """Return bool [b, tokens], True for the first `count` [b] tokens of each row."""
    return expand_leading_dims(jnp.arange(tokens, dtype=count.dtype), 2) < count[:, None]


class Packing(NamedTuple):
    """Permutation of tokens that moves each row's padding to the end."""

    order: Array  # index of the token at each position, int32 [b, t]
    inverse: Array  # position of each token, int32 [b, t]
    tokens: Array  # number of tokens of each row, int32 [b]


def make_packing(padding: Array) -> Packing:
    """Move the padding of each row to its end, preserving the order of tokens.

    Args:
        padding: bool [b, t], True at padding.
    """
    order = jnp.argsort(padding, axis=1, stable=True).astype(jnp.int32)
    inverse = jnp.argsort(order, axis=1).astype(jnp.int32)
    return Packing(order, inverse, jnp.sum(~padding, axis=1, dtype=jnp.int32))


def pack(x: Array, packing: Packing) -> Array:
    """Reorder `x` [b, t, ...] so that each row's padding comes last."""
    return _gather(x, packing.order)


def unpack(x: Array, packing: Packing) -> Array:
    """Undo `pack` for `x` [b, t, ...]: restore the order of tokens."""
    return _gather(x, packing.inverse)


def _range(count: int, ndim: int) -> Array:
    return expand_leading_dims(jnp.arange(count, dtype=jnp.int32), ndim)


def _gather(x: Array, index: Array) -> Array:
    """Gather tokens [b, s] of `x` [b, t, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
