"""Sums over all pairs of a segment and an earlier memory, at half the work of the masked square.

The triangle of pairs is cut into squares: the upper half of the segments reads the lower half of
the memories, then both halves are cut in the same way, side by side. Squares of one size run
together in one scan over their memories, so no weight is copied and each product spans all of a
square's tokens.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mc_core.triangle import Squares, cut_triangle
from mc_jax.backends import Weights
from mc_jax.numerics import Array

# (tokens [a, b, h, c, i], gates [a, b, h, c], weights each [a, b, h, o, i]) -> weighted reads
# [a, b, h, c, o]; a: squares side by side
BlockRead = Callable[[Array, Array, Weights], Array]


def sum_over_earlier(read: BlockRead, x: Array, gates: Array, weights: Weights) -> Array:
    """Return, for the tokens of each segment s, `Σ_{i<s} read(x, gates_i, weights_i)`.

    Args:
        read: how tokens read one memory, weighted by their gates.
        x: tokens by segment [b, h, n, c, i], n >= 2.
        gates: [b, h, n, c, n], entry (s, i) weighs memory i for a token of segment s.
        weights: memories, each [b, n, h, o, i].

    Returns:
        [b, h, n, c, o] in the gates' dtype.
    """
    b, h, n, c, _ = x.shape
    total = None
    for squares in cut_triangle(n):
        rows = squares.segments
        part = _read_squares(
            read,
            x[:, :, rows.clip(max=n - 1)],
            _gates_of(gates, squares),
            tuple(w[:, squares.memories] for w in weights),
        )
        part = part.reshape(b, h, rows.size, c, -1)
        if total is None:
            total = jnp.zeros_like(part, shape=(b, h, n, c, part.shape[-1]))
        inside = rows.reshape(-1) < n
        kept = part if inside.all() else part[:, :, np.flatnonzero(inside)]
        total = total.at[:, :, rows.reshape(-1)[inside]].add(kept)
    assert total is not None
    return total


def _gates_of(gates: Array, squares: Squares) -> Array:
    """Gather [half, a, b, h, rows * c] from [b, h, n, c, n]."""
    rows = squares.segments.clip(max=gates.shape[2] - 1)
    picked = gates[:, :, rows[:, :, None], :, squares.memories[:, None, :]]
    a, r, m, b, h, c = picked.shape  # advanced indices come first
    return picked.transpose(2, 0, 3, 4, 1, 5).reshape(m, a, b, h, r * c)


def _read_squares(read: BlockRead, x: Array, gates: Array, weights: Weights) -> Array:
    b, h, a, r, c, i = x.shape
    x = x.transpose(2, 0, 1, 3, 4, 5).reshape(a, b, h, r * c, i)
    memories = tuple(w.transpose(2, 1, 0, 3, 4, 5) for w in weights)

    # Only the tokens and one memory are kept for the backward pass, never a product's result.
    @partial(jax.checkpoint, prevent_cse=False)
    def weighted(x: Array, gate: Array, memory: Weights) -> Array:
        return read(x, gate, memory)

    def step(total: Array, one: tuple[Array, Weights]) -> tuple[Array, None]:
        gate, memory = one
        return total + weighted(x, gate, memory), None

    one = jax.tree.map(lambda m: m[0], (gates, memories))
    if len(gates) == 1:
        total = weighted(x, *one)
    else:
        shape = jax.eval_shape(weighted, x, *one).shape
        total, _ = jax.lax.scan(step, jnp.zeros_like(gates, shape=shape), (gates, memories))
    return total.reshape(a, b, h, r, c, -1).transpose(1, 2, 0, 3, 4, 5)
