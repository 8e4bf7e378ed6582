"""Where the tokens of a call stand on the grid of chunks and segments, row by row.

A stream may be cut anywhere, and rows may have come to different positions, so the grid follows
from positions that only the running program knows. Its shape does not: it has room for the chunks
that so many tokens touch from the worst position.
"""

from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import torch

from mc_core.config import MCConfig
from mc_torch.numerics import Array, align


class Grid(NamedTuple):
    """Consecutive chunks of each row, from the one that its first token falls in."""

    source: Array  # the token at each place, int64 [b, g, c]; t where there is none
    place: Array  # the place of each token, int64 [b, t]; g * c where there is none
    segment: Array  # the segment of each token, int64 [b, t]
    opens: Array  # bool [g, b, 1], the chunk's first token is in this call
    restarts: Array  # bool [g, b, 1], and is a segment's first
    ends: Array  # bool [g, b, 1], the chunk completes a segment
    last: Array  # the chunks that complete the next segments, int64 [b, s]; any where none does
    slots: Array  # those segments, int64 [b, s]; beyond all slots where they stay incomplete
    slot: Array  # the segment of the row's last token so far, int32 [b]


def make_grid(position: Array, count: Array, tokens: int, config: MCConfig) -> Grid:
    """Lay out the tokens of a call.

    Args:
        position: tokens that each row has had, int32 [b].
        count: tokens that each row has now, its first ones, int32 [b].
        tokens: t, the length of the call.
        config: gives segment and chunk size.
    """
    tokens = index(tokens)  # a number, where a compiler gives a symbol
    position, count, device = position.long(), count.long(), position.device
    size = config.segment_size
    width = min(config.chunk_size, size)
    per_segment = -(-size // width)

    def begin_of(chunk: Array) -> Array:
        return chunk // per_segment * size + chunk % per_segment * width

    chunks = _chunks_touched(tokens, size, width)
    completed = (size - 1 + tokens) // size
    places = min(width, tokens)

    first = _chunk_of(position, size, width)
    chunk = first[:, None] + _range(chunks, 2, device)
    begin = begin_of(chunk) - position[:, None]
    end = begin_of(chunk + 1) - position[:, None]
    here = begin.clamp(min=0)  # the first token of this call in the chunk
    stop = torch.minimum(end, count[:, None])
    source = here[..., None] + _range(places, 3, device)
    source = torch.where(source < stop[..., None], source, tokens)

    token = _range(tokens, 2, device)
    at = position[:, None] + token
    ordinal = _chunk_of(at, size, width) - first[:, None]
    place = ordinal * places + token - torch.gather(here, 1, ordinal)
    place = torch.where(token < count[:, None], place, chunks * places)

    opens = (begin >= 0) & (begin < stop)
    segment_end = chunk % per_segment == per_segment - 1
    ends = segment_end & (end <= count[:, None])
    segment = position // size
    following = segment[:, None] + _range(completed, 2, device)
    complete = (following + 1) * size <= (position + count)[:, None]
    last = (following + 1) * per_segment - 1 - first[:, None]

    def lead(x: Array) -> Array:
        return x.T[..., None]

    return Grid(
        source=source,
        place=place,
        segment=at // size,
        opens=lead(opens),
        restarts=lead(opens & (chunk % per_segment == 0)),
        ends=lead(ends),
        last=last.clamp(0, chunks - 1),
        slots=torch.where(complete, following, torch.iinfo(torch.int32).max),
        slot=((position + count - 1).clamp(min=0) // size).to(torch.int32),
    )


def to_places(x: Array, grid: Grid) -> Array:
    """Bring `x` [b, t, h, ...] to [g, b, 1, h, c, ...]; zeros where there is no token."""
    b, chunks, places = grid.source.shape
    x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    x = _take(x, grid.source.reshape(b, -1)).reshape(b, 1, chunks, places, *x.shape[2:])
    return x.permute(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_places(x: Array, grid: Grid) -> Array:
    """Undo `to_places` for [g, b, 1, h, c, v]; zeros where there is no token."""
    chunks, b, _, h, places, width = x.shape
    x = x.permute(1, 2, 0, 4, 3, 5).reshape(b, chunks * places, h, width)
    return _take(torch.cat([x, torch.zeros_like(x[:, :1])], dim=1), grid.place)


def first_tokens(count: Array, tokens: int) -> Array:
    """Return bool [b, tokens], True at the first `count` [b] tokens of each row."""
    return _range(tokens, 2, count.device) < count[:, None]


class Packing(NamedTuple):
    """Rows of different lengths, moved to the left."""

    order: Array  # the token at each place, int64 [b, t]
    place: Array  # the place of each token, int64 [b, t]
    tokens: Array  # how many each row has, int32 [b]


def make_packing(padding: Array) -> Packing:
    """Move the tokens of each row to its left, in their order.

    Args:
        padding: bool [b, t], True where a row has no token.
    """
    order = torch.argsort(padding.to(torch.uint8), dim=1, stable=True)
    place = torch.argsort(order, dim=1)
    return Packing(order, place, torch.sum(~padding, dim=1, dtype=torch.int32))


def pack(x: Array, packing: Packing) -> Array:
    """Bring `x` [b, t, ...] into the order of places."""
    return _take(x, packing.order)


def unpack(x: Array, packing: Packing) -> Array:
    """Undo `pack`: bring [b, w, ...] back to the positions of [b, t, ...]; 0 at padding."""
    return _take(x, packing.place)


def _chunk_of(at: Any, size: int, width: int) -> Any:
    """Return the chunk that a position falls in, counted over all segments."""
    return at // size * -(-size // width) + at % size // width


@torch.compiler.assume_constant_result
def _chunks_touched(tokens: int, size: int, width: int) -> int:
    return _most_chunks(tokens, size, width)


@lru_cache(maxsize=256)
def _most_chunks(tokens: int, size: int, width: int) -> int:
    """Return how many chunks consecutive tokens touch at most."""
    return 1 + max(
        _chunk_of(offset + tokens - 1, size, width) - _chunk_of(offset, size, width)
        for offset in range(size)
    )


def _range(count: int, ndim: int, device: torch.device) -> Array:
    return align(torch.arange(count, device=device), ndim)


def _take(x: Array, index: Array) -> Array:
    """Take places [b, s] of `x` [b, t, ...]."""
    b, t, *rest = x.shape
    row = torch.arange(b, device=x.device)[:, None] * t
    taken = torch.index_select(x.reshape(b * t, *rest), 0, (row + index).reshape(-1))
    return taken.reshape(*index.shape, *rest)
