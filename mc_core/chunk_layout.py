"""Number and size of the chunks that a call's tokens of a stream fall into."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mc_core.config import MCConfig


class CallShape(NamedTuple):
    """Static sizes of a call. They hold for every position at which the call may begin."""

    segment: int  # tokens of a segment
    chunk: int  # tokens of a chunk; a segment's last one may have fewer
    per_segment: int  # chunks of a segment
    chunks: int  # maximum number of chunks that the call's tokens fall into
    width: int  # maximum number of the call's tokens in a chunk
    completed: int  # maximum number of segments that the call completes

    def chunk_index(self, position: Any) -> Any:
        """Return the index of the chunk that holds a position, counted over all segments."""
        return position // self.segment * self.per_segment + position % self.segment // self.chunk

    def chunk_start(self, chunk: Any) -> Any:
        """Return the position of a chunk's first token."""
        first = chunk // self.per_segment * self.segment
        return first + chunk % self.per_segment * self.chunk


def call_shape(tokens: int, config: MCConfig) -> CallShape:
    """Return the sizes for calls of a given length.

    With segments of 4 and chunks of 3, every second chunk has a single token. 8 tokens fall into at
    most 5 chunks (from position 2) and complete at most 2 segments:

        position  0 1 2 | 3 || 4 5 6 | 7 || 8 9 10 | 11 || 12
        chunk         0 | 1 ||     2 | 3 ||      4 |  5 ||  6

    Args:
        tokens: t, the length of a call.
        config: segment and chunk size.
    """
    return _call_shape(tokens, config.segment_size, min(config.chunk_size, config.segment_size))


@lru_cache(maxsize=256)
def _call_shape(tokens: int, segment: int, chunk: int) -> CallShape:
    completed = (segment - 1 + tokens) // segment
    shape = CallShape(segment, chunk, -(-segment // chunk), 0, min(chunk, tokens), completed)
    first = np.arange(segment)
    touched = shape.chunk_index(first + tokens - 1) - shape.chunk_index(first) + 1
    return shape._replace(chunks=int(touched.max()))
