"""Between the caller's token order and the layouts in which chunks and segments are parallel."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mc_core import segmentation
from mc_core.config import MCConfig
from mc_torch.numerics import Array


class Index(NamedTuple):
    """Where to take tokens from, and what is known of it without looking at the tensor."""

    at: Array  # int64
    identity: bool  # every token in its order
    padded: bool  # some entries are one past the last token


@dataclass(frozen=True)
class TensorPlan:
    """`mc_core`'s plan of segments and chunks, with its index arrays on a device."""

    tokens: int
    segments: int
    lengths: tuple[int, ...]  # tokens of each segment
    full_length: int  # tokens of the last segment when it is complete
    limit: int  # of a cache after all tokens
    rows: int
    chunk_size: int
    index: Index  # [rows * chunks * chunk_size] the token at each place
    place_of: Index  # [t] the place of each token
    padded_segments: Index  # [n * longest] the tokens of each segment
    segment_places: Index  # [t] the places of tokens in `padded_segments`
    restarts: tuple[bool, ...]  # [chunks] where the first row starts anew; others do at 0 alone
    last_chunk: tuple[int, ...]  # [n] the flat chunk of each segment's last token
    segment_of: tuple[int, ...]  # [t] each token's segment
    opens_segment: tuple[bool, ...]  # [t]
    opens_chunk: tuple[bool, ...]  # [t]


def make_plan(
    tokens: int, config: MCConfig, lengths: Sequence[int] | None, device: torch.device
) -> TensorPlan:
    """Plan the segments and chunks of `tokens` tokens; see `mc_core.make_plan`."""
    # A compiler that has met two lengths gives the next as a symbol: `index` makes it a number.
    lengths = None if lengths is None else tuple(lengths)
    return _constant_plan(index(tokens), config, lengths, device)


@torch.compiler.assume_constant_result
def _constant_plan(
    tokens: int, config: MCConfig, lengths: tuple[int, ...] | None, device: torch.device
) -> TensorPlan:
    # Tensors that are made under a mode, such as the fake ones of `torch.export`, are its own.
    make = _make_plan if _get_current_dispatch_mode() is None else _make_plan.__wrapped__
    return make(tokens, config, lengths, device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cached tensors take part in later backward passes
def _make_plan(
    tokens: int, config: MCConfig, lengths: tuple[int, ...] | None, device: torch.device
) -> TensorPlan:
    plan = segmentation.make_plan(tokens, config, lengths)

    def tensor(x: np.ndarray) -> Array:
        return torch.tensor(x, dtype=torch.int64, device=device)

    def places(x: np.ndarray, size: int) -> Index:
        return Index(tensor(x), np.array_equal(x, np.arange(size)), bool(x.max() == size))

    padded = plan.padded_segments.reshape(-1)
    return TensorPlan(
        tokens=tokens,
        segments=plan.segments,
        lengths=plan.lengths,
        full_length=plan.full_length,
        limit=plan.limit,
        rows=plan.rows,
        chunk_size=plan.chunk_size,
        index=places(plan.index, tokens),
        place_of=places(plan.place_of, plan.index.size),
        padded_segments=places(padded, tokens),
        segment_places=places(plan.segment_places, padded.size),
        restarts=tuple(plan.restarts[0].tolist()),
        last_chunk=tuple(plan.last_chunk.tolist()),
        segment_of=tuple(plan.segment_of.tolist()),
        opens_segment=tuple(plan.opens_segment.tolist()),
        opens_chunk=tuple(plan.opens_chunk.tolist()),
    )


def take_tokens(x: Array, index: Index) -> Array:
    """Take tokens [b, len(index), ...] of `x` [b, t, ...]; zeros where the index is t."""
    if index.identity:
        return x
    if index.padded:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)
    return torch.index_select(x, 1, index.at)


def to_chunks(x: Array, plan: TensorPlan) -> Array:
    """Bring `x` [b, t, h, ...] to [g, b, r, h, c, ...]: r rows of g chunks."""
    b, _, h, *rest = x.shape
    x = take_tokens(x, plan.index)
    x = x.reshape(b, plan.rows, -1, plan.chunk_size, h, *rest)
    return x.permute(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_chunks(x: Array, plan: TensorPlan) -> Array:
    """Undo `to_chunks` for [g, b, r, h, c, v]; empty places fall away."""
    x = x.permute(1, 2, 0, 4, 3, 5)
    b, r, g, c, h, width = x.shape
    return take_tokens(x.reshape(b, r * g * c, h, width), plan.place_of)


def to_segments(x: Array, plan: TensorPlan) -> Array:
    """Bring `x` [b, t, h, ...] to [b, h, n, c, ...], c the longest segment's tokens."""
    b, _, h, *rest = x.shape
    x = take_tokens(x, plan.padded_segments)
    x = x.reshape(b, plan.segments, -1, h, *rest)
    return x.permute(0, 3, 1, 2, *range(4, x.ndim))


def from_segments(x: Array, plan: TensorPlan) -> Array:
    """Undo `to_segments` for [b, h, n, c, v]; empty places fall away."""
    b, h, n, c, width = x.shape
    return take_tokens(x.permute(0, 2, 3, 1, 4).reshape(b, n * c, h, width), plan.segment_places)
