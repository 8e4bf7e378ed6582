"""Static plans of the segments and chunks of a sequence (section 4.2)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mc_core.config import FENWICK, SEGMENTATIONS, MCConfig

NOT_STREAMABLE = -1  # capacity of a cache that cannot be extended


def segment_lengths(tokens: int, segmentation: str, segment_size: int = 256) -> tuple[int, ...]:
    """Return the lengths of the segments of a sequence, in order.

    Args:
        tokens: number of tokens, at least 1.
        segmentation: `constant` (the last segment may be shorter), `logarithmic` (the powers of two
            that sum to `tokens`, in descending order), or `fenwick` (the segments that the last
            token reads: its buckets, largest first, and its own segment).
        segment_size: number of tokens per segment under `constant` and `fenwick`.

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
        return _binary_digits(tokens)
    if segmentation == FENWICK:
        complete = (tokens - 1) // segment_size
        buckets = tuple(segment_size * count for count in _binary_digits(complete))
        return *buckets, tokens - complete * segment_size
    names = ", ".join(map(repr, SEGMENTATIONS))
    raise ValueError(f"segmentation = {segmentation!r}: must be one of {names}")


def bucket_ends(segments: int, complete: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the last segment of each bucket of 2^e segments, e = 0, 1, ... (section 7).

    Bucket e of a token after c complete segments ends with segment `(c >> e << e) - 1`, if bit e of
    c is set. Example: after 6 segments, bucket 2 has segments 0 to 3 and bucket 1 segments 4 and 5.

    Args:
        segments: number of segments n.
        complete: numbers of complete segments c.

    Returns:
        [len(complete), bit_length(n)]; n where there is no bucket.
    """
    count = np.asarray(complete)[:, None]
    exponent = np.arange(segments.bit_length())
    return np.where(count >> exponent & 1, (count >> exponent << exponent) - 1, segments)


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
        full_chunk: number of tokens of a complete chunk, except for the last chunk of a segment.
        streams: True if the sequence can be extended, because its segments are those of a stream.
        has_buckets: True if cached memories are buckets of segments.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    rows: int
    chunk_tokens: np.ndarray
    last_chunk: np.ndarray
    restarts: np.ndarray
    full_length: int
    full_chunk: int
    streams: bool
    has_buckets: bool = False

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

    @property
    def complete(self) -> int:
        """Number of complete segments."""
        return self.segments - (self.lengths[-1] < self.full_length)

    @property
    def slots(self) -> int:
        """Number of cached memories, including the online one if it is not a bucket."""
        return self.segments.bit_length() if self.has_buckets else self.segments

    @cached_property
    def bucket_ends(self) -> np.ndarray:
        """[n, slots] last segment of each bucket that the tokens of a segment read; n = none."""
        return bucket_ends(self.segments, range(self.segments))

    @cached_property
    def final_buckets(self) -> np.ndarray:
        """[slots] last segment of each bucket after all tokens; n = none."""
        return bucket_ends(self.segments, [self.complete])[0]

    @cached_property
    def cached_count(self) -> np.ndarray:
        """[t] number of cached memories that each token may read."""
        if not self.has_buckets:
            return self.segment_of
        return np.sum(self.bucket_ends < self.segments, axis=1)[self.segment_of]

    @cached_property
    def readers(self) -> np.ndarray:
        """[slots] number of tokens that may read each cached memory."""
        if not self.has_buckets:
            return self.tokens - self.ends
        return np.asarray(self.lengths) @ (self.bucket_ends < self.segments)

    @property
    def memory_names(self) -> tuple[str, ...]:
        """[slots] name of each cached memory, for plots."""
        if not self.has_buckets:
            return tuple(f"segment {i}" for i in range(self.segments))
        return tuple(f"bucket of {2**i}" for i in range(self.slots))

    @cached_property
    def completes_segment(self) -> np.ndarray:
        """[t] True at the last token of a complete segment."""
        last = np.arange(1, self.tokens + 1) == self.ends[self.segment_of]
        return last & (self.segment_of < self.complete)

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
    def completes_chunk(self) -> np.ndarray:
        """[t] True at the last token of a complete chunk."""
        return ((self.offset_of + 1) % self.full_chunk == 0) | self.completes_segment

    @cached_property
    def complete_chunks(self) -> np.ndarray:
        """[rows, chunks] True for complete chunks; False for chunks of padding."""
        completes = np.append(self.completes_chunk, False)[self.chunk_tokens]
        return completes.reshape(*self.restarts.shape, -1).any(axis=-1)

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
        ValueError: the lengths are not positive or do not add up to `tokens`, or the configuration
            does not allow explicit lengths.
    """
    constant = segment_lengths(tokens, "constant", config.segment_size)
    if lengths is not None and config.has_buckets:
        raise ValueError(
            f"segment_lengths = {list(lengths)}: must be None for segmentation = '{FENWICK}', "
            "which has segments of segment_size tokens"
        )
    if lengths is None and config.has_buckets:
        lengths = constant
    elif lengths is None:
        lengths = segment_lengths(tokens, config.segmentation, config.segment_size)
        _warn_single_segment(tokens, config, lengths)
    lengths = tuple(int(length) for length in lengths)
    if not lengths or min(lengths) < 1 or sum(lengths) != tokens:
        raise ValueError(
            f"segment_lengths = {list(lengths)}: must be positive and add up to {tokens} tokens"
        )
    # Streams require segments of constant size.
    streams = config.segmentation in ("constant", FENWICK) and lengths == constant
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
        full_chunk=config.chunk_size,
        streams=streams,
        has_buckets=config.has_buckets,
    )


def _binary_digits(number: int) -> tuple[int, ...]:
    """Return the powers of two that sum to a number, in descending order."""
    bits = range(number.bit_length() - 1, -1, -1)
    return tuple(1 << bit for bit in bits if number >> bit & 1)


def _warn_single_segment(tokens: int, config: MCConfig, lengths: Sequence[int]) -> None:
    single = len(lengths) == 1 and tokens > 1
    if config.segmentation == "logarithmic" and config.rule.reads_cache and single:
        warnings.warn(
            f"segmentation = 'logarithmic': {tokens} tokens are one segment, so that no memory is "
            f"cached: use '{FENWICK}', which caches at every length and can stream",
            stacklevel=3,
        )


def check_streaming_config(config: MCConfig) -> None:
    """Check that the segmentation does not depend on future tokens.

    Raises:
        ValueError: the segmentation depends on future tokens.
    """
    if config.segmentation == "logarithmic":
        raise ValueError(
            f"segmentation = 'logarithmic': must be 'constant' or '{FENWICK}' for streaming, "
            "because logarithmic segments depend on the length of the sequence"
        )
