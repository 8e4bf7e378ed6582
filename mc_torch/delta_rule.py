"""Exact chunks of the delta rule: all errors of a chunk from one triangular system.

The error of token i is taken at the memory before it, after its decay. This memory contains the
updates of the earlier tokens of the chunk (section 6):

    δ_i = α_i W_{i-1} a_i + e_i
    W_{i-1} = P_{i-1} W_0 + Q_{i-1} S_0 - Σ_{j<i} C[i-1, j] δ_j a_jᵀ

so that `(I + L) δ = e + P_i (W_0 a_i) + α_i Q_{i-1} (S_0 a_i)`, with the strictly lower triangular
`L[i, j] = α_i C[i-1, j] <a_i, a_j>`. The solution is affine in W_0 and S_0. Its maps are computed
for all chunks in parallel; only their products with W_0 and S_0 are sequential. With a target T of
the retention, e has another term `(1 - P_i) (T a_i)`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mc_torch.backends.base import ChunkDecay, MemoryState, RankOneUpdates, Weights, previous_token
from mc_torch.numerics import Array, einsum_f32, scale_rows


class ErrorMaps(NamedTuple):
    """Errors of a chunk as an affine map of the state: `δ = errors + weights W_0ᵀ + momentum S_0ᵀ`.

    Leading axes [..., h], the chunk's tokens c.
    """

    activations: Array  # a [..., c, i]
    errors: Array  # [..., c, o]
    weights: Array  # [..., c, i]
    momentum: Array | None  # [..., c, i]; None without momentum


def solve_chunks(
    updates: RankOneUpdates,
    decay: ChunkDecay,
    retention: Array,
    target: Weights,
    dtype: torch.dtype,
) -> ErrorMaps:
    """Solve the triangular systems of chunks.

    Args:
        updates: activations a [..., h, c, i], and the errors e [..., h, c, o] at the zero memory.
        decay: decay weights of the chunks.
        retention: α [..., h, c], 1 at masked tokens.
        target: weights [h, o, i] to which retention decays the memory; empty = zero.
        dtype: compute dtype of the products.
    """
    (a,), (errors,) = updates
    before = previous_token(decay)
    gram = einsum_f32("...ci,...ei->...ce", a, a, dtype=dtype)
    lower = retention[..., None] * before.updates * gram
    errors = errors.to(lower.dtype)
    if target:
        rest = scale_rows(1 - decay.state, a)
        errors = errors + einsum_f32("...oi,...ci->...co", target[0], rest, dtype=dtype)
    columns = [errors, scale_rows(decay.state, a)]
    if before.momentum is not None:
        columns.append(scale_rows(retention * before.momentum, a))
    inverse, right = unit_lower_inverse(lower), torch.cat(columns, dim=-1)
    solution = einsum_f32("...ce,...ei->...ci", inverse, right, exact=True)
    o, i = errors.shape[-1], a.shape[-1]
    return ErrorMaps(
        activations=a,
        errors=solution[..., :o],
        weights=solution[..., o : o + i],
        momentum=None if before.momentum is None else solution[..., o + i :],
    )


def chunk_errors(maps: ErrorMaps, state: MemoryState, dtype: torch.dtype) -> Array:
    """Return the errors [..., h, c, o] of a chunk that starts at `state`."""
    read = einsum_f32("...oi,...ci->...co", state.weights[0], maps.weights, dtype=dtype)
    errors = maps.errors + read
    if maps.momentum is None:
        return errors
    return errors + einsum_f32("...oi,...ci->...co", state.momentum[0], maps.momentum, dtype=dtype)


def unit_lower_inverse(lower: Array) -> Array:
    """Return the inverse of `I + lower` for strictly lower triangular `lower` [..., c, c].

    Block forward substitution: from the inverses A and D of two neighbouring diagonal blocks with B
    below A, that of the block of twice the size is `[[A, 0], [-D B A, D]]`. Matrix products only,
    so that row i is bit-identical for every later row.
    """
    *lead, c, _ = lower.shape
    padded = 1 << (c - 1).bit_length()
    lower = F.pad(lower, (0, padded - c, 0, padded - c))
    inverse = torch.ones_like(lower[..., 0]).reshape(*lead, padded, 1, 1)  # diagonal blocks
    size = 1
    while size < padded:
        pairs = padded // (2 * size)
        blocks = lower.reshape(*lead, pairs, 2 * size, pairs, 2 * size)
        below = torch.diagonal(blocks[..., size:, :, :size], dim1=-4, dim2=-2)
        below = torch.movedim(below, -1, -3)  # [..., pairs, size, size]
        first, second = inverse.reshape(*lead, pairs, 2, size, size).unbind(-3)
        low = -einsum_f32("...ab,...bc,...cd->...ad", second, below, first, exact=True)
        top = torch.cat([first, torch.zeros_like(first)], dim=-1)
        inverse = torch.cat([top, torch.cat([low, second], dim=-1)], dim=-2)
        size *= 2
    return inverse[..., 0, :c, :c]
