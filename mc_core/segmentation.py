"""Plans of segments and chunks for a number of tokens: static NumPy index arrays (section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mc_core.config import MCConfig

NO_STREAM = -1  # limit of a cache whose segments are not those of a stream


def segment_lengths(tokens: int, segmentation: str, segment_size: int = 256) -> tuple[int, ...]:
    """Return the segments' lengths, in order, that cover `tokens` tokens.

    Args:
        tokens: number of tokens, at least 1.
        segmentation: `constant` (the last segment may be shorter) or `logarithmic` (the powers of
            two in the binary form of `tokens`, largest first).
        segment_size: tokens of a constant segment.

    Raises:
        ValueError: `tokens` or `segment_size` is not positive, or the name is unknown.
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
    """Where each token stands: its segment, its chunk, its place in the chunk.

    Tokens are laid out in `rows` of chunks of `chunk_size` places; a chunk never crosses a segment.
    A row is a run of chunks that must be written one after another: one row in `checkpoint` mode,
    one a segment in `restart` mode.

    Attributes:
        lengths: tokens of each segment.
        chunk_size: places of a chunk.
        rows: number of rows.
        index: [rows * chunks * chunk_size] the token at each place; `tokens` at an empty place.
        last_chunk: [n] the flat chunk that holds each segment's last token.
        restarts: [rows, chunks] True where a chunk starts from the initial memory.
        full_length: tokens of the last segment when it is complete.
        streams: whether a stream's segments are cut so, whose next token may follow.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    rows: int
    index: np.ndarray
    last_chunk: np.ndarray
    restarts: np.ndarray
    full_length: int
    streams: bool

    @property
    def limit(self) -> int:
        """The `limit` of a cache after all tokens; NO_STREAM where none may follow."""
        return self.tokens if self.streams else NO_STREAM

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
        """[n] one past each segment's last token."""
        return np.cumsum(self.lengths)

    @cached_property
    def segment_of(self) -> np.ndarray:
        """[t] each token's segment."""
        return np.repeat(np.arange(self.segments), self.lengths)

    @cached_property
    def offset_of(self) -> np.ndarray:
        """[t] each token's place in its segment."""
        return np.arange(self.tokens) - (self.ends - np.asarray(self.lengths))[self.segment_of]

    @cached_property
    def opens_segment(self) -> np.ndarray:
        """[t] True where a token is a segment's first."""
        return self.offset_of == 0

    @cached_property
    def opens_chunk(self) -> np.ndarray:
        """[t] True where a token is a chunk's first."""
        return self.offset_of % self.chunk_size == 0

    @cached_property
    def place_of(self) -> np.ndarray:
        """[t] each token's place in `index`."""
        place = np.zeros(self.tokens, np.int64)
        filled = np.flatnonzero(self.index < self.tokens)
        place[self.index[filled]] = filled
        return place

    @cached_property
    def padded_segments(self) -> np.ndarray:
        """[n, longest] the tokens of each segment; `tokens` where a segment is shorter."""
        within = np.arange(max(self.lengths))
        starts = self.ends - np.asarray(self.lengths)
        inside = within < np.asarray(self.lengths)[:, None]
        return np.where(inside, starts[:, None] + within, self.tokens)

    @cached_property
    def segment_places(self) -> np.ndarray:
        """[t] each token's place in `padded_segments`."""
        return np.flatnonzero(self.padded_segments.reshape(-1) < self.tokens)


def make_plan(tokens: int, config: MCConfig, lengths: Sequence[int] | None = None) -> Plan:
    """Plan the segments and chunks of `tokens` tokens.

    Args:
        tokens: number of tokens.
        config: gives segmentation, segment size, chunk size and start mode.
        lengths: explicit segment lengths that override the configuration's segmentation.

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
    # A segment of constant size goes on with the next token; others end where they are cut.
    streams = config.segmentation == "constant" and lengths == constant
    size = min(config.chunk_size, max(lengths))
    counts = [-(-length // size) for length in lengths]
    restart = config.state_init_mode == "restart"
    # Segments of very unequal length would mostly be padding as parallel rows.
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
        index=index.reshape(-1),
        last_chunk=first + np.asarray(counts) - 1,
        restarts=restarts.reshape(rows, chunks),
        full_length=config.segment_size if streams else lengths[-1],
        streams=streams,
    )


def check_streams(config: MCConfig) -> None:
    """Refuse to stream segments that depend on tokens to come.

    Raises:
        ValueError: says which segmentation streams.
    """
    if config.segmentation == "logarithmic":
        raise ValueError(
            "segmentation = 'logarithmic': its cuts depend on the total length, so it cannot "
            "stream: use 'constant'"
        )
