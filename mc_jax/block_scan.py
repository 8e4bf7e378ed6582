"""Blocks of a model in one `lax.scan`, so that a program has the code of each kind of block once.

Each block keeps its own parameters, so that weights, optimizer states and checkpoints do not depend
on the scan. The forward pass stacks them along a new first axis, which is not sharded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_jax.numerics import Array
from mc_jax.sharding import constrain


def scan_blocks(
    blocks: Sequence[nnx.Module],
    period: int,
    run: Callable[[nnx.Module, Array], Array],
    x: Array,
) -> Array:
    """Apply blocks to x [b, t, d] in order: repetitions of a pattern of blocks as one scan.

    The blocks after the last whole repetition are not part of the scan. If the blocks of two
    repetitions differ, because a user has wrapped one, or if they have other state than parameters,
    such as random streams, there is no scan.

    Args:
        blocks: the blocks.
        period: number of blocks in the pattern.
        run: function of a block and its input [b, t, d] that returns its output [b, t, d].
        x: input of the first block.
    """
    scanned = len(blocks) // period * period
    graphdefs, params, rest = zip(*(nnx.split(b, nnx.Param, ...) for b in blocks), strict=True)
    kinds = [
        (graph, jax.tree.structure(state)) for graph, state in zip(graphdefs, params, strict=True)
    ]
    if any(map(jax.tree.leaves, rest)) or kinds[:scanned] != kinds[:period] * (scanned // period):
        scanned = 0

    def repetition(x: Array, states: Sequence[nnx.State]) -> tuple[Array, None]:
        for graphdef, state in zip(graphdefs, states, strict=False):
            x = run(nnx.merge(graphdef, state), x)
        return x, None

    if scanned:
        stacks = [_stack(params[i:scanned:period]) for i in range(period)]
        x, _ = jax.lax.scan(repetition, x, stacks)
    for block in blocks[scanned:]:
        x = run(block, x)
    return x


def _stack(states: Sequence[nnx.State]) -> nnx.State:
    """Return the states of equal blocks as one, with a new first axis."""

    def stack(*params: nnx.Variable) -> Any:
        axes = params[0].get_metadata().get("axes", ())
        return params[0].replace(constrain(jnp.stack([p[...] for p in params]), None, *axes))

    return jax.tree.map(stack, *states, is_leaf=lambda node: isinstance(node, nnx.Variable))
