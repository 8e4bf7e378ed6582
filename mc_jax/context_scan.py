"""State carried across the blocks of a split sequence (see `mc_jax.context_memory`).

If writes are `W_t = α_t W_{t-1} + U_t`, the state after a block is its state from zero plus the
decayed state before it, so that a prefix scan over blocks needs only their final states and decays.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mc_core.config import MCConfig
from mc_core.segmentation import Plan
from mc_jax.backends import Memory, Weights
from mc_jax.chunked import WriteResult
from mc_jax.context import TokenSplit, gather_blocks, split_blocks, take_blocks
from mc_jax.numerics import Array, expand_leading_dims


class DeviceBlocks(NamedTuple):
    """The work of one device: s blocks, each of which is a row of `plan`."""

    memory: Memory
    config: MCConfig
    split: TokenSplit
    plan: Plan  # of one block
    blocks: Array  # indices of the device's blocks, int32 [s]

    def to_rows(self, x: Array) -> Array:
        """Reshape [b, s * c, ...] to [b * s, c, ...]."""
        return x.reshape(x.shape[0] * self.blocks.size, -1, *x.shape[2:])

    def from_rows(self, x: Array) -> Array:
        """Reshape [b * s, c, ...] to [b, s * c, ...]."""
        return x.reshape(x.shape[0] // self.blocks.size, -1, *x.shape[2:])

    @property
    def segments(self) -> int:
        """Number of segments of the sequence."""
        return self.split.blocks * self.plan.segments


def previous_tokens(context: DeviceBlocks, tokens: Weights, mask: Array) -> Weights:
    """Return the last unmasked token before each block: [b * s, h, k] of each [b, s * c, h, k].

    It may be in any earlier block, so the last one of every block is gathered. Zero if there is
    none.
    """
    blocks, split = context.blocks, context.split
    number = expand_leading_dims(jnp.arange(1, context.plan.tokens + 1, dtype=jnp.int32), 3)
    last = jnp.max(jnp.where(split_blocks(mask, blocks), number, 0), axis=2)  # [b, s], 0 = none
    index = jnp.maximum(last - 1, 0)[:, :, None, None, None]
    joined = jnp.concatenate([split_blocks(x, blocks) for x in tokens], axis=-1)
    latest = jnp.take_along_axis(joined, index, axis=2)[:, :, 0]  # [b, s, h, k + v]
    flag = jnp.broadcast_to((last > 0)[..., None, None], (*latest.shape[:3], 1))
    every = gather_blocks(jnp.concatenate([latest, flag.astype(latest.dtype)], axis=-1), split)

    place = jnp.arange(1, split.blocks + 1, dtype=jnp.int32)[None, :, None]
    filled = jax.lax.cummax(jnp.where(every[..., -1] > 0, place, 0), axis=1)  # [b, blocks, h]
    padded = jnp.concatenate([jnp.zeros_like(every[:, :1]), every], axis=1)
    before = jnp.concatenate([jnp.zeros_like(filled[:, :1]), filled[:, :-1]], axis=1)
    chosen = jnp.take_along_axis(padded, before[..., None], axis=1)[..., :-1]
    own = context.to_rows(take_blocks(chosen, blocks, split))[:, 0]
    width = tokens[0].shape[-1]
    return own[..., :width], own[..., width:]


def chunk_retention(writes: WriteResult) -> Array:
    """Return the product of the retention of each chunk [g, b * s, h]."""
    assert writes.online is not None
    return writes.online.decay.state[:, :, 0, :, -1]


def carry_states(
    context: DeviceBlocks, ends: Weights, decay: Array, initial: Weights
) -> tuple[Weights, Weights]:
    """Return the states before all blocks [b, blocks, ...] and after all segments [b, m, ...].

    Args:
        context: the work of the device.
        ends: memory after each segment, if its block begins at zero, each [b, m, h, o, i].
        decay: product of the retention from the block's start to the segment's end [b, m, h].
        initial: weights W_0 per layer, each [h, o, i].
    """
    memory, blocks = context.memory, context.split.blocks

    def by_block(x: Array) -> Array:
        return x.reshape(x.shape[0], blocks, -1, *x.shape[2:])

    ends, decay = jax.tree.map(by_block, (ends, decay))  # [b, blocks, m / blocks, h, ...]

    def step(state: Weights, block: tuple[Weights, Array]) -> tuple[Weights, Weights]:
        end, factor = block
        retained = memory.retain(state, factor)
        return tuple(w + e for w, e in zip(retained, end, strict=True)), state

    last = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, -1], 1, 0), (ends, decay))
    start = tuple(
        w[None].astype(e.dtype) + jnp.zeros_like(e[:, 0, 0])
        for w, e in zip(memory.prepare(initial), ends, strict=True)
    )
    _, before = jax.lax.scan(step, start, last)
    before = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), before)
    retained = memory.retain(jax.tree.map(lambda x: x[:, :, None], before), decay)
    after = tuple(w + e for w, e in zip(retained, ends, strict=True))
    return before, jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), after)


def add_carried(
    context: DeviceBlocks, writes: WriteResult, before: Weights, chunk_decay: Array, decay: Array
) -> WriteResult:
    """Add the decayed state before each block to the writes of a device's blocks.

    Args:
        context: the work of the device.
        writes: of blocks that begin at zero.
        before: states before all blocks, each [b, blocks, h, o, i].
        chunk_decay: product of the retention up to the end of each chunk [g, b * s, h].
        decay: the same, of each segment [b * s, n, h].
    """
    memory, online = context.memory, writes.online
    assert online is not None
    state = tuple(
        context.to_rows(take_blocks(w, context.blocks, context.split))[:, 0] for w in before
    )
    begin = jnp.concatenate([jnp.ones_like(chunk_decay[:1]), chunk_decay[:-1]])

    def add(weights: Weights, state: Weights, factor: Array) -> Weights:
        return tuple(w + c for w, c in zip(weights, memory.retain(state, factor), strict=True))

    by_chunk = tuple(w[:, :, 0] for w in online.weights)
    carried = add(by_chunk, tuple(w[None] for w in state), begin)
    return writes._replace(
        online=online._replace(weights=tuple(w[:, :, None] for w in carried)),
        ends=add(writes.ends, tuple(w[:, None] for w in state), decay),
        final=writes.final._replace(weights=add(writes.final.weights, state, decay[:, -1])),
    )
