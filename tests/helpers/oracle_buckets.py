"""The oracle's buckets under `segmentation="fenwick"` (section 7): one head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from helpers.oracle_gates import pooled
from mc_core import MCConfig

Array = np.ndarray


class Block(NamedTuple):
    """A whole block of `segment_size` tokens, after its last token."""

    memory: Any  # weights and normalizer of its state
    keys: list[Array]  # its unmasked keys, each [k]
    decay: float  # product of the retention of its unmasked tokens


class Bucket(NamedTuple):
    """A cached memory, of 2^exponent blocks."""

    exponent: int
    memory: Any
    pool: Array  # [k]
    length: int  # number of unmasked tokens


def buckets_of(blocks: Sequence[Block], width: int, config: MCConfig) -> list[Bucket]:
    """Return the buckets that a token after these whole blocks reads, largest and oldest first."""
    found, first, rest = [], 0, len(blocks)
    while rest:
        exponent = 0
        while 2 ** (exponent + 1) <= rest:
            exponent += 1
        inside = blocks[first : first + 2**exponent]
        keys = [key for block in inside for key in block.keys]
        memory = inside[-1].memory
        if config.state_init_mode == "restart":
            memory = _sum_states(inside)
        found.append(Bucket(exponent, memory, pooled(keys, width, config), len(keys)))
        first, rest = first + 2**exponent, rest - 2**exponent
    return found


def _sum_states(blocks: Sequence[Block]) -> Any:
    """Return the sum of the states of blocks, each decayed by the blocks after it."""
    weights, normalizer = 0.0, 0.0
    for i, block in enumerate(blocks):
        after = 1.0
        for later in blocks[i + 1 :]:
            after = after * later.decay
        weights = weights + after * block.memory.weights[0]
        if block.memory.normalizer is not None:
            normalizer = normalizer + after * block.memory.normalizer
    last = blocks[-1].memory
    return type(last)((weights,), None if last.normalizer is None else normalizer)
