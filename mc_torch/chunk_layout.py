"""Rearrangement of tokens into chunks and segments for parallel computation.

Full sequences follow a static `Plan`. A stream may be split anywhere and its rows may have
different positions, so the chunks of a call depend on dynamic positions. Their number is static: it
is the maximum number of chunks that a call of this length can span.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mc_core import segmentation
from mc_core.chunk_layout import CallShape, call_shape
from mc_core.config import MCConfig
from mc_torch.numerics import Array, expand_leading_dims


class TokenIndex(NamedTuple):
    """Indices of tokens to gather, with static properties."""

    positions: Array  # int64
    identity: bool  # True if the indices are 0, 1, 2, ...
    padded: bool  # True if some indices refer to padding, one past the last token


@dataclass(frozen=True)
class TensorPlan:
    """Plan of segments and chunks from `mc_core`, with index tensors on a device."""

    tokens: int
    segments: int
    complete: int  # number of complete segments
    slots: int  # number of cached memories
    has_buckets: bool
    lengths: tuple[int, ...]  # number of tokens of each segment
    capacity: int  # capacity of the cache after all tokens
    rows: int
    chunk_size: int
    chunk_tokens: TokenIndex  # [rows * chunks * chunk_size] token at each position
    chunk_positions: TokenIndex  # [t] position of each token
    segment_tokens: TokenIndex  # [n * longest] tokens of each segment
    segment_positions: TokenIndex  # [t] position of each token in `segment_tokens`
    restarts: tuple[
        bool, ...
    ]  # [chunks] restarts of the first row; other rows restart only at chunk 0
    complete_chunks: Array | None  # bool [chunks, 1, rows], True for complete chunks; None = all
    first_chunk: Array  # [n] flat index of the first chunk of each segment, int64
    last_chunk: tuple[int, ...]  # [n] flat index of the last chunk of each segment
    chunk_segments: Array  # [rows * chunks] segment of each chunk, int64
    segment_of: tuple[int, ...]  # [t] segment of each token
    starts_segment: tuple[bool, ...]  # [t]
    starts_chunk: tuple[bool, ...]  # [t]
    completes_chunk: tuple[bool, ...]  # [t]
    completes_segment: tuple[bool, ...]  # [t]
    cached_count: tuple[int, ...]  # [t] number of cached memories that each token may read
    bucket_ends: Array  # [n, slots] last segment of each bucket of a segment's tokens, int64
    final_buckets: Array  # [slots] last segment of each bucket after all tokens, int64


def make_plan(
    tokens: int, config: MCConfig, lengths: Sequence[int] | None, device: torch.device
) -> TensorPlan:
    """Plan the segments and chunks of `tokens` tokens; see `mc_core.make_plan`."""
    # After two lengths, torch.compile makes the length symbolic: `index` converts it to a number.
    lengths = None if lengths is None else tuple(lengths)
    return _constant_plan(index(tokens), config, lengths, device)


@torch.compiler.assume_constant_result
def _constant_plan(
    tokens: int, config: MCConfig, lengths: tuple[int, ...] | None, device: torch.device
) -> TensorPlan:
    # Tensors created under a dispatch mode, such as fake tensors of `torch.export`, are not cached.
    make = _make_plan if _get_current_dispatch_mode() is None else _make_plan.__wrapped__
    return make(tokens, config, lengths, device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cached tensors are used in backward passes
def _make_plan(
    tokens: int, config: MCConfig, lengths: tuple[int, ...] | None, device: torch.device
) -> TensorPlan:
    plan = segmentation.make_plan(tokens, config, lengths)

    def tensor(x: np.ndarray) -> Array:
        return torch.tensor(x, dtype=torch.int64, device=device)

    def token_index(x: np.ndarray, size: int) -> TokenIndex:
        return TokenIndex(tensor(x), np.array_equal(x, np.arange(size)), bool(x.max() == size))

    padded = plan.segment_tokens.reshape(-1)
    complete = None
    if not plan.complete_chunks.all():
        complete = torch.tensor(plan.complete_chunks.T, device=device)[:, None]
    return TensorPlan(
        tokens=tokens,
        segments=plan.segments,
        complete=plan.complete,
        slots=plan.slots,
        has_buckets=plan.has_buckets,
        lengths=plan.lengths,
        capacity=plan.capacity,
        rows=plan.rows,
        chunk_size=plan.chunk_size,
        chunk_tokens=token_index(plan.chunk_tokens, tokens),
        chunk_positions=token_index(plan.chunk_positions, plan.chunk_tokens.size),
        segment_tokens=token_index(padded, tokens),
        segment_positions=token_index(plan.segment_positions, padded.size),
        restarts=tuple(plan.restarts[0].tolist()),
        complete_chunks=complete,
        first_chunk=tensor(plan.first_chunk),
        last_chunk=tuple(plan.last_chunk.tolist()),
        chunk_segments=tensor(plan.chunk_segments),
        segment_of=tuple(plan.segment_of.tolist()),
        starts_segment=tuple(plan.starts_segment.tolist()),
        starts_chunk=tuple(plan.starts_chunk.tolist()),
        completes_chunk=tuple(plan.completes_chunk.tolist()),
        completes_segment=tuple(plan.completes_segment.tolist()),
        cached_count=tuple(plan.cached_count.tolist()),
        bucket_ends=tensor(plan.bucket_ends),
        final_buckets=tensor(plan.final_buckets),
    )


def gather_tokens(x: Array, index: TokenIndex) -> Array:
    """Gather tokens [b, len(index), ...] of `x` [b, t, ...]; zeros where the index is t."""
    if index.identity:
        return x
    if index.padded:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    return torch.index_select(x, 1, index.positions)


def to_chunks(x: Array, plan: TensorPlan) -> Array:
    """Rearrange `x` [b, t, h, ...] into r rows of g chunks: [g, b, r, h, c, ...]."""
    b, _, h, *rest = x.shape
    x = gather_tokens(x, plan.chunk_tokens)
    x = x.reshape(b, plan.rows, -1, plan.chunk_size, h, *rest)
    return x.permute(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_chunks(x: Array, plan: TensorPlan) -> Array:
    """Undo `to_chunks` for [g, b, r, h, c, v]; drops padding."""
    x = x.permute(1, 2, 0, 4, 3, 5)
    b, r, g, c, h, width = x.shape
    return gather_tokens(x.reshape(b, r * g * c, h, width), plan.chunk_positions)


def to_segments(x: Array, plan: TensorPlan) -> Array:
    """Rearrange `x` [b, t, h, ...] into segments [b, h, n, c, ...], padded to the longest."""
    b, _, h, *rest = x.shape
    x = gather_tokens(x, plan.segment_tokens)
    x = x.reshape(b, plan.segments, -1, h, *rest)
    return x.permute(0, 3, 1, 2, *range(4, x.ndim))


def from_segments(x: Array, plan: TensorPlan) -> Array:
    """Undo `to_segments` for [b, h, n, c, v]; drops padding."""
    b, h, n, c, width = x.shape
    return gather_tokens(
        x.permute(0, 2, 3, 1, 4).reshape(b, n * c, h, width), plan.segment_positions
    )


class CallLayout(NamedTuple):
    """Assignment of the tokens of a call to consecutive chunks, for each row."""

    chunk_tokens: Array  # token at each position of the chunks, int64 [b, g, c]; t = none
    chunk_positions: Array  # position of each token in the chunks, int64 [b, t]; g * c = none
    segment: Array  # segment of each token, int64 [b, t]
    has_first_token: Array  # bool [g, b, 1], True if the call contains the chunk's first token
    completes_chunk: Array  # bool [g, b, 1], True if the call contains the chunk's last token
    starts_segment: Array  # bool [g, b, 1], True if this token is also the first of a segment
    completes_segment: Array  # bool [g, b, 1], True if the chunk completes a segment
    completing_chunk: Array  # chunks that complete the next s segments, int64 [b, s]
    completed_slots: Array  # slots of these segments, int64 [b, s]; out of range if incomplete
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
    tokens = index(tokens)  # converts a symbol of a compiler to a number
    shape = _call_shape(tokens, config)
    size, per_segment, width = shape.segment, shape.per_segment, shape.width
    position, count, device = position.long()[:, None], count.long()[:, None], position.device

    # Chunks [b, g]; begin, end and stop are relative to the call's first token.
    first = shape.chunk_index(position)
    chunk = first + _range(shape.chunks, 2, device)
    begin = shape.chunk_start(chunk) - position
    end = shape.chunk_start(chunk + 1) - position
    stop = torch.minimum(end, count)
    first_here = begin.clamp(min=0)  # the call's first token in the chunk
    chunk_tokens = first_here[..., None] + _range(width, 3, device)
    chunk_tokens = torch.where(chunk_tokens < stop[..., None], chunk_tokens, tokens)
    has_first_token = (begin >= 0) & (begin < stop)
    completes_chunk = end <= count

    # Tokens [b, t].
    token = _range(tokens, 2, device)
    positions = position + token
    ordinal = shape.chunk_index(positions) - first
    chunk_positions = ordinal * width + token - torch.gather(first_here, 1, ordinal)
    chunk_positions = torch.where(token < count, chunk_positions, shape.chunks * width)

    # Segments that the call may complete [b, s].
    following = position // size + _range(shape.completed, 2, device)
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
        completing_chunk=last.clamp(0, shape.chunks - 1),
        completed_slots=torch.where(complete, following, torch.iinfo(torch.int32).max),
        slot=((position + count - 1).clamp(min=0)[:, 0] // size).to(torch.int32),
    )


def to_call_chunks(x: Array, layout: CallLayout) -> Array:
    """Rearrange `x` [b, t, h, ...] into [g, b, 1, h, c, ...]; zeros where there is no token."""
    b, chunks, width = layout.chunk_tokens.shape
    x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    x = _gather(x, layout.chunk_tokens.reshape(b, -1)).reshape(b, 1, chunks, width, *x.shape[2:])
    return x.permute(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_call_chunks(x: Array, layout: CallLayout) -> Array:
    """Undo `to_call_chunks` for [g, b, 1, h, c, v]; zeros where there is no token."""
    chunks, b, _, h, width, features = x.shape
    x = x.permute(1, 2, 0, 4, 3, 5).reshape(b, chunks * width, h, features)
    return _gather(torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), layout.chunk_positions)


def first_tokens(count: Array, tokens: int) -> Array:
    """Return bool [b, tokens], True for the first `count` [b] tokens of each row."""
    return _range(tokens, 2, count.device) < count[:, None]


class Packing(NamedTuple):
    """Permutation of tokens that moves each row's padding to the end."""

    order: Array  # index of the token at each position, int64 [b, t]
    inverse: Array  # position of each token, int64 [b, t]
    tokens: Array  # number of tokens of each row, int32 [b]


def make_packing(padding: Array) -> Packing:
    """Move the padding of each row to its end, preserving the order of tokens.

    Args:
        padding: bool [b, t], True at padding.
    """
    order = torch.argsort(padding.to(torch.uint8), dim=1, stable=True)
    inverse = torch.argsort(order, dim=1)
    return Packing(order, inverse, torch.sum(~padding, dim=1, dtype=torch.int32))


def pack(x: Array, packing: Packing) -> Array:
    """Reorder `x` [b, t, ...] so that each row's padding comes last."""
    return _gather(x, packing.order)


def unpack(x: Array, packing: Packing) -> Array:
    """Undo `pack` for `x` [b, t, ...]: restore the order of tokens."""
    return _gather(x, packing.inverse)


@torch.compiler.assume_constant_result
def _call_shape(tokens: int, config: MCConfig) -> CallShape:
    return call_shape(tokens, config)


def _range(count: int, ndim: int, device: torch.device) -> Array:
    return expand_leading_dims(torch.arange(count, device=device), ndim)


def _gather(x: Array, index: Array) -> Array:
    """Gather tokens [b, s] of `x` [b, t, ...]."""
    b, t, *rest = x.shape
    row = torch.arange(b, device=x.device)[:, None] * t
    gathered = torch.index_select(x.reshape(b * t, *rest), 0, (row + index).reshape(-1))
    return gathered.reshape(*index.shape, *rest)
