"""Checks of a stream's cache by shape and value, for arrays of any framework."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mc_core.checks import check_integers, check_static
from mc_core.config import LayerConfig
from mc_core.segmentation import NOT_STREAMABLE

NO_SLOT = 2**31 - 1  # slot of the online segment if it has none
INVALIDATED = 2**30  # position of a stream with output NaN; larger than any capacity


def check_cache_options(batch: int, max_tokens: int, cache_device: str) -> None:
    """Check the arguments of `init_cache`.

    Raises:
        ValueError: an argument is invalid; the message states its value and the allowed values.
    """
    if cache_device not in ("device", "host"):
        raise ValueError(f"cache_device = {cache_device!r}: must be one of 'device', 'host'")
    for name, value, minimum in (("batch", batch, 0), ("max_tokens", max_tokens, 1)):
        if value < minimum:
            raise ValueError(f"{name} = {value}: must be >= {minimum}")


def check_streamable(capacity: int) -> None:
    """Check that the segments of a cache are those of a stream, so that it can be extended.

    Args:
        capacity: capacity of the cache in tokens.

    Raises:
        ValueError: the segments are explicit or logarithmic.
    """
    if capacity == NOT_STREAMABLE:
        raise ValueError(
            "cache cannot be extended: its segments are not those of a stream: use segmentation = "
            "'constant' or 'fenwick' without segment_lengths"
        )


def check_growth(capacity: int, max_tokens: int) -> None:
    """Check that `grow` does not shrink a cache.

    Args:
        capacity: capacity of the cache in tokens.
        max_tokens: the new capacity.

    Raises:
        ValueError: the new capacity is smaller, or the cache cannot be extended.
    """
    check_streamable(capacity)
    if max_tokens < capacity:
        raise ValueError(
            f"max_tokens = {max_tokens}: must be >= {capacity}, the capacity of the cache"
        )


def check_capacity(
    position: Sequence[int] | np.ndarray, tokens: int | Sequence[int] | np.ndarray, capacity: int
) -> None:
    """Check that a cache has capacity for the next tokens. Invalidated streams are ignored.

    Args:
        position: number of processed tokens per row, [b].
        tokens: number of next tokens, of all rows or [b].
        capacity: capacity of the cache in tokens.

    Raises:
        ValueError: the capacity is exceeded, or the cache cannot be extended.
    """
    check_streamable(capacity)
    position = np.asarray(position, np.int64)
    valid = position < INVALIDATED
    end = int(np.max(position + np.asarray(tokens), where=valid, initial=0))
    if end > capacity:
        last = int(np.max(position, where=valid, initial=0))
        raise ValueError(
            f"cache has max_tokens = {capacity}: the call would advance position {last} to {end}: "
            f"call grow(cache, {end}) first"
        )


def check_extend_inputs(
    x: Any,
    cache: Any,
    kind: type[Any],
    config: LayerConfig,
    is_static: Callable[[Any], bool],
) -> None:
    """Check the cache and the tokens that a layer is extended with.

    Args:
        x: tokens [b, t, d].
        cache: state before these tokens.
        kind: the layer's type of cache, which has `heads` and `position`.
        config: the layer's configuration.
        is_static: function that returns True if a size is a number, not a symbol of a program.

    Raises:
        ValueError: the cache or the tokens do not match; the message states the mismatch.
    """
    if not isinstance(cache, kind):
        raise ValueError(f"cache is a {type(cache).__name__}: must be the layer's {kind.__name__}")
    heads, width = cache.heads
    if (heads, width) != (config.kv_heads, config.head_dim):
        raise ValueError(
            f"cache has {heads} heads of width {width}: must have {config.kv_heads} heads of "
            f"width {config.head_dim}, like the layer"
        )
    batch = cache.position.shape[0]
    if x.ndim == 3:
        check_static("tokens", x.shape[1], is_static(x.shape[1]))
    if x.ndim != 3 or x.shape[0] != batch or x.shape[1] < 1 or x.shape[-1] != config.d_model:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: must be [b, t, {config.d_model}] with b = {batch}, the "
            "batch size of cache, and t >= 1"
        )


def check_extend_tokens(
    tokens: Any, cache: Sequence[Any], blocks: int, is_static: Callable[[Any], bool]
) -> None:
    """Check the caches and the token ids that a model is extended with.

    Args:
        tokens: ids [b, t].
        cache: state before these tokens, one cache per block.
        blocks: number of blocks of the model.
        is_static: function that returns True if a size is a number, not a symbol of a program.

    Raises:
        ValueError: the cache or the tokens do not match; the message states the mismatch.
    """
    if len(cache) != blocks:
        raise ValueError(f"cache has {len(cache)} blocks: must have {blocks}")
    batch = cache[0].position.shape[0]
    if tokens.ndim == 2:
        check_static("tokens", tokens.shape[1], is_static(tokens.shape[1]))
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}: must be [b, t] with b = {batch}, the batch "
            "size of cache, and t >= 1"
        )


def check_row_indices(rows: Any, batch: int) -> None:
    """Check the shape of the row indices of `take_rows`.

    Args:
        rows: integers [r], an array.
        batch: number of streams in the cache.

    Raises:
        ValueError: the shape is invalid.
    """
    shape = tuple(rows.shape)
    if len(shape) != 1:
        raise ValueError(f"rows has shape {shape}: must be [r]")
    if not batch and shape[0]:
        raise ValueError(f"rows has shape {shape}: must be [0] for a cache with 0 streams")


def to_row_indices(rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return row indices as an array of integers.

    Raises:
        ValueError: the indices are not integers.
    """
    # NumPy would convert an empty list to floats.
    array = np.asarray(rows) if len(rows) else np.zeros(0, np.int64)
    check_integers("rows", array.dtype.name)
    return array


def block_caches(cache: Any) -> tuple[Any, ...]:
    """Return the caches of a model's blocks, or of a layer, as a tuple."""
    return (cache,) if hasattr(cache, "capacity") else tuple(cache)
