"""Where the tokens of a call stand on the grid of chunks and segments, row by row.

A stream may be cut anywhere, and rows may have come to different positions, so the grid follows
from positions that only the running program knows. Its shape does not: it has room for the chunks
that so many tokens touch from the worst position.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mc_core.config import MCConfig
from mc_core.grids import grid_shape
from mc_jax.numerics import Array, align


class Grid(NamedTuple):
    """Consecutive chunks of each row, from the one that its first token falls in."""

    source: Array  # the token at each place, int32 [b, g, c]; t where there is none
    place: Array  # the place of each token, int32 [b, t]; g * c where there is none
    segment: Array  # the segment of each token, int32 [b, t]
    opens: Array  # bool [g, b, 1], the chunk's first token is in this call
    restarts: Array  # bool [g, b, 1], and is a segment's first
    ends: Array  # bool [g, b, 1], the chunk completes a segment
    last: Array  # the chunks that complete the next segments, int32 [b, s]; any where none does
    slots: Array  # those segments, int32 [b, s]; beyond all slots where they stay incomplete
    slot: Array  # the segment of the row's last token so far, int32 [b]


def make_grid(position: Array, count: Array, tokens: int, config: MCConfig) -> Grid:
    """Lay out the tokens of a call.

    With segments of 4 and chunks of 3, a row that has had 5 tokens and now has 8 (t = 8), of which
    `end` marks a segment's last:

        position        5  6 | 7 end | 8  9  10 | 11 end | 12
        token           0  1 | 2     | 3  4  5  | 6      | 7
        chunk           2    | 3     | 4        | 5      | 6

        source  = [[0, 1, 8], [2, 8, 8], [3, 4, 5], [6, 8, 8], [7, 8, 8]]
        place   = [0, 1, 3, 6, 7, 8, 9, 12]
        segment = [1, 1, 1, 2, 2, 2, 2, 3], slot = 3
        opens   = [F, T, T, T, T], restarts = [F, F, T, F, T], ends = [F, T, F, T, F]
        last    = [1, 3], slots = [1, 2]: chunks 1 and 3 of the call complete segments 1 and 2

    Args:
        position: tokens that each row has had, int32 [b].
        count: tokens that each row has now, its first ones, int32 [b].
        tokens: t, the length of the call.
        config: gives segment and chunk size.
    """
    shape = grid_shape(tokens, config)
    size, per_segment, places = shape.segment, shape.per_segment, shape.places
    position, count = position[:, None], count[:, None]

    # Chunks [b, g]; begin, end and stop count from the call's first token.
    first = shape.chunk_of(position)
    chunk = first + _range(shape.chunks, 2)
    begin = shape.begin_of(chunk) - position
    end = shape.begin_of(chunk + 1) - position
    stop = jnp.minimum(end, count)
    here = jnp.maximum(begin, 0)  # the first token of this call in the chunk
    source = here[..., None] + _range(places, 3)
    source = jnp.where(source < stop[..., None], source, tokens)
    opens = (begin >= 0) & (begin < stop)
    ends = (chunk % per_segment == per_segment - 1) & (end <= count)

    # Tokens [b, t].
    token = _range(tokens, 2)
    at = position + token
    ordinal = shape.chunk_of(at) - first
    place = ordinal * places + token - jnp.take_along_axis(here, ordinal, axis=1)
    place = jnp.where(token < count, place, shape.chunks * places)

    # Segments that the call may complete [b, s].
    following = position // size + _range(shape.completed, 2)
    complete = (following + 1) * size <= position + count
    last = (following + 1) * per_segment - 1 - first

    def lead(x: Array) -> Array:
        return x.T[..., None]

    return Grid(
        source=source,
        place=place,
        segment=at // size,
        opens=lead(opens),
        restarts=lead(opens & (chunk % per_segment == 0)),
        ends=lead(ends),
        last=jnp.clip(last, 0, shape.chunks - 1),
        slots=jnp.where(complete, following, np.iinfo(np.int32).max),
        slot=jnp.maximum(position + count - 1, 0)[:, 0] // size,
    )


def to_places(x: Array, grid: Grid) -> Array:
    """Bring `x` [b, t, h, ...] to [g, b, 1, h, c, ...]; zeros where there is no token."""
    b, chunks, places = grid.source.shape
    x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    x = _take(x, grid.source.reshape(b, -1)).reshape(b, 1, chunks, places, *x.shape[2:])
    return x.transpose(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_places(x: Array, grid: Grid) -> Array:
    """Undo `to_places` for [g, b, 1, h, c, v]; zeros where there is no token."""
    chunks, b, _, h, places, width = x.shape
    x = x.transpose(1, 2, 0, 4, 3, 5).reshape(b, chunks * places, h, width)
    return _take(jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1), grid.place)


def first_tokens(count: Array, tokens: int) -> Array:
    """Return bool [b, tokens], True at the first `count` [b] tokens of each row."""
    return align(jnp.arange(tokens, dtype=count.dtype), 2) < count[:, None]


class Packing(NamedTuple):
    """Rows of different lengths, moved to the left."""

    order: Array  # the token at each place, int32 [b, t]
    place: Array  # the place of each token, int32 [b, t]
    tokens: Array  # how many each row has, int32 [b]


def make_packing(padding: Array) -> Packing:
    """Move the tokens of each row to its left, in their order.

    Args:
        padding: bool [b, t], True where a row has no token.
    """
    order = jnp.argsort(padding, axis=1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    return Packing(order, place, jnp.sum(~padding, axis=1, dtype=jnp.int32))


def pack(x: Array, packing: Packing) -> Array:
    """Bring `x` [b, t, ...] into the order of places."""
    return _take(x, packing.order)


def unpack(x: Array, packing: Packing) -> Array:
    """Undo `pack`: bring [b, w, ...] back to the positions of [b, t, ...]; 0 at padding."""
    return _take(x, packing.place)


def _range(count: int, ndim: int) -> Array:
    return align(jnp.arange(count, dtype=jnp.int32), ndim)


def _take(x: Array, index: Array) -> Array:
    """Take places [b, s] of `x` [b, t, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
