"""Static sizes of a streaming call: segments, chunks, and tokens per chunk."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mc_core.config import MCConfig


class CallShape(NamedTuple):
    """Static sizes of a call, valid for every start position in the stream."""

    segment: int  # tokens per segment
    chunk: int  # tokens per chunk; the last chunk of a segment may be shorter
    per_segment: int  # chunks per segment
    chunks: int  # maximum number of chunks that contain tokens of the call
    width: int  # maximum number of tokens of the call per chunk
    completed: int  # maximum number of segments that the call completes

    def chunk_index(self, position: Any) -> Any:
        """Return the index of the chunk of a position; chunks are numbered across segments."""
        return position // self.segment * self.per_segment + position % self.segment // self.chunk

    def chunk_start(self, chunk: Any) -> Any:
        """Return the position of a chunk's first token."""
        first = chunk // self.per_segment * self.segment
        return first + chunk % self.per_segment * self.chunk


def call_shape(tokens: int, config: MCConfig) -> CallShape:
    """Return the sizes for calls of a given length.

    Example: segments of 4, chunks of 3. A segment has one chunk of 3 tokens and one of 1 token. 8
    tokens span at most 5 chunks (from position 2) and complete at most 2 segments:

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
