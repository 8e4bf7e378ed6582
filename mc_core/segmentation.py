"""Static plans of the segments and chunks of a sequence (section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mc_core.config import MCConfig

NOT_STREAMABLE = -1  # capacity of a cache that cannot be extended


def segment_lengths(tokens: int, segmentation: str, segment_size: int = 256) -> tuple[int, ...]:
    """Return the lengths of the segments of a sequence, in order.

    Args:
        tokens: number of tokens, at least 1.
        segmentation: `constant` (the last segment may be shorter) or `logarithmic` (the powers of
            two that sum to `tokens`, in descending order).
        segment_size: number of tokens per segment under `constant`.

    Raises:
        ValueError: `tokens` or `segment_size` is not positive, or `segmentation` is unknown.
    """
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: must be >= 1")
    if segment_size < 1:
        raise ValueError(f"segment_size = {segment_size}: must be >= 1")
    if segmentation == "constant":
        full, rest = divmod(tokens, segment_size)
        return (segment_size,) * full + ((rest,) if rest else ())
    if segmentation == "logarithmic":
        bits = range(tokens.bit_length() - 1, -1, -1)
        return tuple(1 << bit for bit in bits if tokens >> bit & 1)
    raise ValueError(f"segmentation = {segmentation!r}: must be one of 'constant', 'logarithmic'")


@dataclass(frozen=True)
class Plan:
    """Assignment of tokens to segments and chunks.

    Tokens are arranged in `rows` of chunks of `chunk_size` positions, with padding: a chunk never
    crosses a segment boundary. Rows are written in parallel, chunks of a row sequentially. There is
    one row in `checkpoint` mode and usually one row per segment in `restart` mode.

    Attributes:
        lengths: number of tokens of each segment.
        chunk_size: number of positions of a chunk.
        rows: number of rows.
        chunk_tokens: [rows * chunks * chunk_size] index of the token at each position; `tokens` at
            padding.
        last_chunk: [n] flat index of the last chunk of each segment.
        restarts: [rows, chunks] True where a chunk starts from the initial memory.
        full_length: number of tokens of the last segment when complete.
        streams: True if the sequence can be extended, because its segments are those of a stream.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    rows: int
    chunk_tokens: np.ndarray
    last_chunk: np.ndarray
    restarts: np.ndarray
    full_length: int
    streams: bool

    @property
    def capacity(self) -> int:
        """Capacity of a cache after all tokens; NOT_STREAMABLE if it cannot be extended."""
        return self.tokens if self.streams else NOT_STREAMABLE

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(self.lengths)

    @property
    def segments(self) -> int:
        """Number of segments n."""
        return len(self.lengths)

    @cached_property
    def ends(self) -> np.ndarray:
        """[n] end of each segment (exclusive)."""
        return np.cumsum(self.lengths)

    @cached_property
    def segment_of(self) -> np.ndarray:
        """[t] segment of each token."""
        return np.repeat(np.arange(self.segments), self.lengths)

    @cached_property
    def offset_of(self) -> np.ndarray:
        """[t] position of each token in its segment."""
        return np.arange(self.tokens) - (self.ends - np.asarray(self.lengths))[self.segment_of]

    @cached_property
    def starts_segment(self) -> np.ndarray:
        """[t] True at the first token of a segment."""
        return self.offset_of == 0

    @cached_property
    def starts_chunk(self) -> np.ndarray:
        """[t] True at the first token of a chunk."""
        return self.offset_of % self.chunk_size == 0

    @cached_property
    def first_chunk(self) -> np.ndarray:
        """[n] flat index of the first chunk of each segment."""
        return self.chunk_positions[self.starts_segment] // self.chunk_size

    @cached_property
    def chunk_segments(self) -> np.ndarray:
        """[rows * chunks] segment of each chunk; the last one for chunks of padding."""
        first = self.chunk_tokens[:: self.chunk_size]
        return self.segment_of[np.minimum(first, self.tokens - 1)]

    @cached_property
    def chunk_positions(self) -> np.ndarray:
        """[t] position of each token in `chunk_tokens`."""
        positions = np.zeros(self.tokens, np.int64)
        filled = np.flatnonzero(self.chunk_tokens < self.tokens)
        positions[self.chunk_tokens[filled]] = filled
        return positions

    @cached_property
    def segment_tokens(self) -> np.ndarray:
        """[n, longest] indices of each segment's tokens; `tokens` at padding."""
        within = np.arange(max(self.lengths))
        starts = self.ends - np.asarray(self.lengths)
        inside = within < np.asarray(self.lengths)[:, None]
        return np.where(inside, starts[:, None] + within, self.tokens)

    @cached_property
    def segment_positions(self) -> np.ndarray:
        """[t] position of each token in the flattened `segment_tokens`."""
        return np.flatnonzero(self.segment_tokens.reshape(-1) < self.tokens)


def make_plan(tokens: int, config: MCConfig, lengths: Sequence[int] | None = None) -> Plan:
    """Plan the segments and chunks of a sequence.

    Args:
        tokens: number of tokens.
        config: segmentation, segment size, chunk size and start mode.
        lengths: explicit segment lengths, which override the configuration.

    Raises:
        ValueError: the lengths are not positive or do not add up to `tokens`.
    """
    constant = segment_lengths(tokens, "constant", config.segment_size)
    if lengths is None:
        lengths = segment_lengths(tokens, config.segmentation, config.segment_size)
    lengths = tuple(int(length) for length in lengths)
    if not lengths or min(lengths) < 1 or sum(lengths) != tokens:
        raise ValueError(
            f"segment_lengths = {list(lengths)}: must be positive and add up to {tokens} tokens"
        )
    # Streams require segments of constant size.
    streams = config.segmentation == "constant" and lengths == constant
    size = min(config.chunk_size, max(lengths))
    counts = [-(-length // size) for length in lengths]
    restart = config.state_init_mode == "restart"
    # For segments of very different lengths, parallel rows would be mostly padding.
    parallel = restart and len(lengths) * max(counts) <= 2 * sum(counts)
    rows, chunks = (len(lengths), max(counts)) if parallel else (1, sum(counts))
    first = np.arange(len(lengths)) * chunks if parallel else np.cumsum([0, *counts[:-1]])

    index = np.full((rows * chunks, size), tokens, np.int64)
    start = 0
    for chunk, count, length in zip(first, counts, lengths, strict=True):
        index[chunk : chunk + count].reshape(-1)[:length] = np.arange(start, start + length)
        start += length
    restarts = np.zeros(rows * chunks, bool)
    restarts[first if restart else first[:1]] = True
    return Plan(
        lengths=lengths,
        chunk_size=size,
        rows=rows,
        chunk_tokens=index.reshape(-1),
        last_chunk=first + np.asarray(counts) - 1,
        restarts=restarts.reshape(rows, chunks),
        full_length=config.segment_size if streams else lengths[-1],
        streams=streams,
    )


def check_streaming_config(config: MCConfig) -> None:
    """Check that the segmentation does not depend on future tokens.

    Raises:
        ValueError: the segmentation depends on future tokens.
    """
    if config.segmentation == "logarithmic":
        raise ValueError(
            "segmentation = 'logarithmic': must be 'constant' for streaming, because logarithmic "
            "segments depend on the length of the sequence"
        )
