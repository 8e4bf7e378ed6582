"""The shape of the grid of chunks and segments on which a call's tokens of a stream stand."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mc_core.config import MCConfig


class GridShape(NamedTuple):
    """Sizes that hold at every position: of a call, and of the chunks that it touches at most."""

    segment: int  # tokens of a segment
    chunk: int  # tokens of a chunk; a segment's last one may have fewer
    per_segment: int  # chunks of a segment
    chunks: int  # that a call's tokens touch at most
    places: int  # for the call's tokens in each of them
    completed: int  # segments that a call completes at most

    def chunk_of(self, at: Any) -> Any:
        """Return the chunk that a position falls in, counted over all segments."""
        return at // self.segment * self.per_segment + at % self.segment // self.chunk

    def begin_of(self, chunk: Any) -> Any:
        """Return the position of a chunk's first token."""
        first = chunk // self.per_segment * self.segment
        return first + chunk % self.per_segment * self.chunk


def grid_shape(tokens: int, config: MCConfig) -> GridShape:
    """Return the sizes for calls of some length.

    With segments of 4 and chunks of 3, of which every second one has a single token, 8 tokens touch
    5 chunks at most and complete 2 segments:

        position  0 1 2 | 3 || 4 5 6 | 7 || 8 9 10 | 11 || 12
        chunk         0 | 1 ||     2 | 3 ||      4 |  5 ||  6

    Args:
        tokens: t, the length of a call.
        config: gives segment and chunk size.
    """
    return _grid_shape(tokens, config.segment_size, min(config.chunk_size, config.segment_size))


@lru_cache(maxsize=256)
def _grid_shape(tokens: int, segment: int, chunk: int) -> GridShape:
    completed = (segment - 1 + tokens) // segment
    shape = GridShape(segment, chunk, -(-segment // chunk), 0, min(chunk, tokens), completed)
    first = np.arange(segment)
    touched = shape.chunk_of(first + tokens - 1) - shape.chunk_of(first) + 1
    return shape._replace(chunks=int(touched.max()))
