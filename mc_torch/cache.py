"""The streaming state of a layer's memories: an immutable tree, valid between any two tokens."""

from typing import NamedTuple

import torch

from mc_torch.backends import Memory, MemoryState, Weights
from mc_torch.numerics import Array, state_dtype, tree_map


class Segments(NamedTuple):
    """The memory of every segment after its last token so far (section 4)."""

    weights: Weights  # first layer first, each [b, n, h, o, i]
    pool: Array  # pooled keys m [b, n, h, k]
    length: Array  # real tokens of the segment, int32 [b, n]


class Cache(NamedTuple):
    """All that the next token needs to know of the ones before it."""

    segments: Segments
    state: MemoryState  # the online memory
    pool_sum: Array  # sum of the online segment's keys [b, h, k]
    length: Array  # real tokens of the online segment, int32 [b]
    position: Array  # tokens so far, masked ones included, int32 [b]


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: W_0, first layer first, each [h, o, i].
        k: keys [..., h, c, k]; the state's leading axes, device and dtype come from them.
        v: values [..., h, c, v].
    """
    dtype = state_dtype(k.dtype)
    weights = tuple(
        w.to(dtype).expand(*k.shape[:-3], *w.shape).clone() for w in memory.prepare(initial)
    )
    momentum = tree_map(torch.zeros_like, weights) if memory.config.kind == "titans" else ()
    previous: Weights = ()
    if memory.reaches_back:
        previous = tuple(torch.zeros_like(x[..., 0, :], dtype=dtype) for x in (k, v))
    return MemoryState(weights, momentum, weights if memory.is_mlp else (), previous)


def choose(condition: Array, yes: MemoryState, no: MemoryState) -> MemoryState:
    """Select whole states; `condition` [b] or [b, r] matches their leading axes."""

    def pick(a: Array, b: Array) -> Array:
        return torch.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return tree_map(pick, yes, no)
