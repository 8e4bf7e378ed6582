"""Checks of a stream's cache, by names, shapes and numbers alone: for arrays of any framework."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mc_core.checks import check_fixed, check_integers
from mc_core.config import AttentionConfig, MCConfig
from mc_core.segmentation import NO_STREAM

ENDED = 2**30  # position of a stream that can only give NaN; no limit reaches it


def check_cache_options(batch: int, max_tokens: int, cache_device: str) -> None:
    """Hold to their ranges what says how many streams there are, how long, and where.

    Raises:
        ValueError: names what is out of range.
    """
    if cache_device not in ("device", "host"):
        raise ValueError(f"cache_device = {cache_device!r}: must be one of 'device', 'host'")
    for name, value, least in (("batch", batch, 0), ("max_tokens", max_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} = {value}: must be >= {least}")


def check_goes_on(limit: int) -> None:
    """Refuse a cache whose segments `segment_lengths` cut: the next token's is not known.

    Args:
        limit: the cache's.

    Raises:
        ValueError: says so.
    """
    if limit == NO_STREAM:
        raise ValueError(
            "cache: its segments were cut by segment_lengths, not by the configuration: it cannot "
            "go on as a stream"
        )


def check_growth(limit: int, max_tokens: int) -> None:
    """Refuse a room that is less than a cache has.

    Args:
        limit: tokens that the cache has room for.
        max_tokens: those that it is to have room for.

    Raises:
        ValueError: names both, or the segments are not those of a stream.
    """
    check_goes_on(limit)
    if max_tokens < limit:
        raise ValueError(f"max_tokens = {max_tokens}: must be >= {limit}, as it is now")


def check_room(
    position: Sequence[int] | np.ndarray, tokens: int | Sequence[int] | np.ndarray, limit: int
) -> None:
    """Refuse tokens that a cache has no room for; streams that have ended need none.

    Args:
        position: tokens of each row so far, [b].
        tokens: to come, for all rows or [b].
        limit: tokens that the cache has room for.

    Raises:
        ValueError: names the position, and what to do, or the segments are not those of a stream.
    """
    check_goes_on(limit)
    position = np.asarray(position, np.int64)
    live = position < ENDED
    ahead = int(np.max(position + np.asarray(tokens), where=live, initial=0))
    if ahead > limit:
        last = int(np.max(position, where=live, initial=0))
        raise ValueError(
            f"cache: max_tokens = {limit}, and position {last} would go to {ahead}: "
            f"grow(cache, {ahead}) first"
        )


def check_rows(
    x: Any,
    cache: Any,
    kind: type[Any],
    config: MCConfig | AttentionConfig,
    is_fixed: Callable[[Any], bool],
) -> None:
    """Refuse a cache of another layer, and tokens that its streams cannot go on with.

    Args:
        x: tokens [b, t, d].
        cache: the streams so far.
        kind: the layer's type of cache, which has `heads` and `position`.
        config: the layer's.
        is_fixed: whether a size is a number rather than a symbol of an export.

    Raises:
        ValueError: names what does not fit.
    """
    if not isinstance(cache, kind):
        raise ValueError(f"cache is a {type(cache).__name__}: must be the layer's {kind.__name__}")
    heads, width = cache.heads
    if (heads, width) != (config.num_heads, config.head_dim):
        raise ValueError(
            f"cache has {heads} heads of width {width}: must have {config.num_heads} of "
            f"{config.head_dim}, as the layer"
        )
    batch = cache.position.shape[0]
    if x.ndim == 3:
        check_fixed("tokens", x.shape[1], is_fixed(x.shape[1]))
    if x.ndim != 3 or x.shape[0] != batch or x.shape[1] < 1 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: must be [b, t, {config.d_model}], b = {batch} as "
            "cache, t >= 1"
        )


def check_next_ids(
    tokens: Any, cache: Sequence[Any], blocks: int, is_fixed: Callable[[Any], bool]
) -> None:
    """Refuse caches of another model, and token ids that their streams cannot go on with.

    Args:
        tokens: ids [b, t].
        cache: the streams so far, one cache of each block.
        blocks: the model's number of them.
        is_fixed: whether a size is a number rather than a symbol of an export.

    Raises:
        ValueError: names what does not fit.
    """
    if len(cache) != blocks:
        raise ValueError(f"cache is of {len(cache)} blocks: must be of {blocks}")
    batch = cache[0].position.shape[0]
    if tokens.ndim == 2:
        check_fixed("tokens", tokens.shape[1], is_fixed(tokens.shape[1]))
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}: must be [{batch}, t], as cache, t >= 1"
        )


def check_taken(chosen: Any, batch: int) -> None:
    """Refuse rows to take that are no vector, or of a cache that has none.

    Args:
        chosen: integers [r], an array.
        batch: streams of the cache.

    Raises:
        ValueError: names the shape.
    """
    shape = tuple(chosen.shape)
    if len(shape) != 1:
        raise ValueError(f"rows have shape {shape}: must be [r]")
    if not batch and shape[0]:
        raise ValueError(f"rows have shape {shape}: the cache has 0 streams to take them from")


def to_indices(rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return rows to take as an array of integers.

    Raises:
        ValueError: they are none.
    """
    # Of an empty list NumPy would make floats.
    array = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
    check_integers("rows", array.dtype.name)
    return array


def caches_of(cache: Any) -> tuple[Any, ...]:
    """Return the caches of all blocks of a model; of a layer, its one."""
    return (cache,) if hasattr(cache, "limit") else tuple(cache)
