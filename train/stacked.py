"""Training states in which the blocks of a scan are stacked.

During training, equal blocks of a model with `model.scans_layers` are one tree with a new first
axis: the optimizer has one array for all of them, and the scan needs no copy. Models, checkpoints
and messages have one tree per block, `blocks/0/...`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from mc_core.config import ModelConfig

Tree = Any
BLOCKS, STACKED = "blocks", "stacked_blocks"


class Stacking(NamedTuple):
    """The blocks that are stacked: every `period`-th one of the first `scanned`."""

    period: int
    scanned: int


def stacking_of(config: ModelConfig) -> Stacking | None:
    """Return the stacking of a model's training state; None = no block is stacked."""
    period = len(config.mixers)
    scanned = config.num_layers // period * period
    return Stacking(period, scanned) if config.scans_layers and scanned > period else None


def stack_blocks(tree: Tree, stacking: Stacking | None) -> Tree:
    """Return a tree with stacked blocks.

    Args:
        tree: parameters, or a tree that contains dictionaries like them, such as moments. Leaves
            are arrays, or `jax.ShapeDtypeStruct` with shardings.
        stacking: the blocks to stack; None = no change.
    """

    def convert(node: Any) -> Any:
        if stacking is None or not _has(BLOCKS, node):
            return node
        blocks, (period, scanned) = node[BLOCKS], stacking
        stacks = {
            i: jax.tree.map(_stack, *(blocks[j] for j in range(i, scanned, period)))
            for i in range(period)
        }
        rest = {j: blocks[j] for j in range(scanned, len(blocks))}
        return {**node, BLOCKS: rest, STACKED: stacks}

    return jax.tree.map(convert, tree, is_leaf=partial(_has, BLOCKS))


def unstack_blocks(tree: Tree) -> Tree:
    """Return a tree with one subtree per block: the inverse of `stack_blocks`, for all leaves."""

    def convert(node: Any) -> Any:
        if not _has(STACKED, node):
            return node
        stacks, blocks = node[STACKED], dict(node[BLOCKS])
        for i, stack in stacks.items():
            leaves, structure = jax.tree.flatten(stack)
            for n, part in enumerate(zip(*map(_unstack, leaves), strict=True)):
                blocks[i + n * len(stacks)] = jax.tree.unflatten(structure, part)
        return {key: value for key, value in node.items() if key != STACKED} | {BLOCKS: blocks}

    return jax.tree.map(convert, tree, is_leaf=partial(_has, STACKED))


def unstack_arrays(tree: Tree) -> Tree:
    """Return `unstack_blocks` of arrays on devices, computed by one program, or the tree itself."""
    if _find_stacks(tree) is None:
        return tree
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    shardings = jax.tree.map(lambda x: x.sharding, unstack_blocks(shapes))
    return jax.jit(unstack_blocks, out_shardings=shardings)(tree)


def stack_like(tree: Tree, like: Tree) -> Tree:
    """Return a tree of arrays with the stacked blocks and the shardings of another one."""
    stacks = _find_stacks(like)
    if stacks is None:
        return tree
    stacking = Stacking(len(stacks), len(stacks) * len(jax.tree.leaves(stacks)[0]))
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(partial(stack_blocks, stacking=stacking), out_shardings=shardings)(tree)


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Return True if the leaf at a path of `jax.tree_util` is a stack."""
    return any(getattr(key, "key", None) == STACKED for key in path)


def finite_flags(tree: Tree) -> Tree:
    """Return a tree of booleans [], for stacks [n]: True if a whole parameter is finite."""

    def of_leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jnp.isfinite(x).all(axis=tuple(range(is_stacked(path), x.ndim)))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def parameter_names(params: Tree) -> list[str]:
    """Return names such as `blocks/0/...`, in the order of the booleans of `finite_flags`."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(finite_flags, params))
    ends = np.cumsum([leaf.size for leaf in leaves], dtype=int)
    numbers = [
        jnp.arange(end - leaf.size, end).reshape(leaf.shape)
        for leaf, end in zip(leaves, ends.tolist(), strict=True)
    ]
    single = unstack_blocks(jax.tree.unflatten(structure, numbers))
    found = jax.tree_util.tree_leaves_with_path(single)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in sorted(found, key=lambda item: int(item[1]))
    ]


def _stack(*leaves: Any) -> Any:
    first = leaves[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.stack(leaves)
    sharding = _map_spec(first.sharding, lambda spec: (None, *spec))
    return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype, sharding=sharding)


def _unstack(x: Any) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return _unstack_array(x)
    sharding = _map_spec(x.sharding, lambda spec: spec[1:])
    return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)] * x.shape[0]


def _map_spec(
    sharding: Sharding | None, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]
) -> Sharding | None:
    if not isinstance(sharding, NamedSharding):
        return sharding  # of a single device
    return NamedSharding(sharding.mesh, PartitionSpec(*change(tuple(sharding.spec))))


@jax.custom_vjp
def _unstack_array(x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the parts of x [n, ...]. XLA removes a stack of all parts, as in `scan_blocks`."""
    return tuple(jax.lax.index_in_dim(x, i, keepdims=False) for i in range(len(x)))


# XLA would not remove the sum of padded parts, the automatic gradient.
_unstack_array.defvjp(lambda x: (_unstack_array(x), None), lambda _, parts: (jnp.stack(parts),))


def _find_stacks(tree: Tree) -> Tree | None:
    nodes = jax.tree.leaves(tree, is_leaf=partial(_has, STACKED))
    return next((node[STACKED] for node in nodes if _has(STACKED, node)), None)


def _has(key: str, node: Any) -> bool:
    return isinstance(node, Mapping) and key in node
