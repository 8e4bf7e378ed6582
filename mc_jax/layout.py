"""Between the caller's token order and the layouts in which chunks and segments are parallel."""

import jax.numpy as jnp
import numpy as np

from mc_core.segmentation import Plan
from mc_jax.numerics import Array


def take_tokens(x: Array, index: np.ndarray) -> Array:
    """Take tokens [b, len(index), ...] of `x` [b, t, ...]; zeros where the index is t."""
    tokens = x.shape[1]
    if np.array_equal(index, np.arange(tokens)):
        return x
    if index.max() == tokens:
        x = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    return jnp.take(x, index, axis=1)


def to_chunks(x: Array, plan: Plan) -> Array:
    """Bring `x` [b, t, h, ...] to [g, b, r, h, c, ...]: r rows of g chunks."""
    b, _, h, *rest = x.shape
    chunks = plan.restarts.shape[1]
    x = take_tokens(x, plan.index)
    x = x.reshape(b, plan.rows, chunks, plan.chunk_size, h, *rest)
    return x.transpose(2, 0, 1, 4, 3, *range(5, x.ndim))


def from_chunks(x: Array, plan: Plan) -> Array:
    """Undo `to_chunks` for [g, b, r, h, c, v]; empty places fall away."""
    x = x.transpose(1, 2, 0, 4, 3, 5)
    b, r, g, c, h, width = x.shape
    return take_places(x.reshape(b, r * g * c, h, width), plan.place_of)


def to_segments(x: Array, plan: Plan) -> Array:
    """Bring `x` [b, t, h, ...] to [b, h, n, c, ...], c the longest segment's tokens."""
    b, _, h, *rest = x.shape
    index = plan.padded_segments
    x = take_tokens(x, index.reshape(-1)).reshape(b, *index.shape, h, *rest)
    return x.transpose(0, 3, 1, 2, *range(4, x.ndim))


def from_segments(x: Array, plan: Plan) -> Array:
    """Undo `to_segments` for [b, h, n, c, v]; empty places fall away."""
    b, h, n, c, width = x.shape
    return take_places(x.transpose(0, 2, 3, 1, 4).reshape(b, n * c, h, width), plan.segment_places)


def take_places(x: Array, places: np.ndarray) -> Array:
    """Return the positions `places` [t] of x [b, p, ...], in token order: [b, t, ...]."""
    if np.array_equal(places, np.arange(x.shape[1])):
        return x
    return jnp.take(x, places, axis=1)
