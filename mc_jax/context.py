"""Tokens of a sequence split over the devices of the mesh axis `context`.

With P devices and without further arguments, device i has the i-th of P blocks of tokens. Later
tokens read more cached memories, so a language model uses another order inside: device i has the
blocks i and 2P - 1 - i of 2P. All devices then read the same number of earlier memories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mc_core.config import AttentionConfig, ModelConfig
from mc_jax.numerics import Array, expand_leading_dims

AXIS = "context"  # name of the mesh axis
_TOKENS = PartitionSpec(None, AXIS)

Tree = Any  # nested tuples of arrays
# (blocks of the device [s], sharded arrays [b, s * c, ...], replicated arrays) -> [b, s * x, ...]
BlockFunction = Callable[[Array, Tree, Tree], Tree]


@jax.tree_util.register_static
@dataclass(frozen=True)
class TokenSplit:
    """Assignment of equal blocks of tokens to devices.

    Attributes:
        devices: number of devices of the axis, P >= 2.
        paired: device i has the blocks i and 2P - 1 - i of 2P; otherwise the block i of P.
    """

    devices: int
    paired: bool = False

    @property
    def per_device(self) -> int:
        """Number of blocks s per device."""
        return 1 + self.paired

    @property
    def blocks(self) -> int:
        """Number of blocks of a sequence."""
        return self.devices * self.per_device

    @property
    def order(self) -> np.ndarray:
        """[blocks] block at each place; device i has the places `i * per_device` and following."""
        first = np.arange(self.devices)
        if not self.paired:
            return first
        return np.stack([first, self.blocks - 1 - first], axis=1).reshape(-1)

    @property
    def places(self) -> np.ndarray:
        """[blocks] place of each block; the inverse of `order`."""
        return np.argsort(self.order)

    def positions(self, tokens: int) -> np.ndarray:
        """Return the position in the sequence of the token at each of `tokens` places."""
        size = tokens // self.blocks
        return (self.order[:, None] * size + np.arange(size)).reshape(-1)

    def check(self, tokens: int, unit: int = 1, name: str = "", reach: int = 0) -> None:
        """Check that a sequence can be split.

        Args:
            tokens: length of the sequence.
            unit: a block must be a multiple of it.
            name: name of the unit, for the error message.
            reach: number of tokens before a block that its first token uses.

        Raises:
            ValueError: the length is no multiple of blocks and unit, or a block is shorter than
                `reach`.
        """
        size = self.blocks * unit
        names = f"{'2 * ' * self.paired}{AXIS}{f' * {name}' if name else ''}"
        if tokens % size:
            raise ValueError(
                f"tokens = {tokens}: must be a multiple of {names} = {size} "
                f"on a mesh with {AXIS} = {self.devices}: pad the sequence and mask the padding"
            )
        if tokens // self.blocks < reach:
            raise ValueError(
                f"tokens = {tokens}: must be >= {self.blocks * reach} on a mesh with {AXIS} = "
                f"{self.devices}, because the first token of a block uses {reach} tokens before it"
            )


def context_devices() -> int:
    """Return the size of the axis `context` of the active mesh; 1 if there is none.

    A mesh is active inside of `jax.set_mesh`. Inside of a `jax.shard_map` over the axis, arrays are
    those of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if AXIS not in mesh.axis_names or AXIS in mesh.manual_axes:
        return 1
    return mesh.shape[AXIS]


def active_split(split: TokenSplit | None = None) -> TokenSplit | None:
    """Return the given split, or that of the active mesh; None without a context axis."""
    if split is None and (devices := context_devices()) > 1:
        return TokenSplit(devices)
    return split


def paired_split(config: ModelConfig, tokens: int) -> TokenSplit | None:
    """Return the balanced split of a model's tokens on the active mesh.

    None without a context axis, or if the length does not allow it; layers then use the split in
    the order of the tokens.
    """
    devices = context_devices()
    layers = config.block_layers
    windows = [x.window or 0 for x in layers if isinstance(x, AttentionConfig)]
    reach = max(config.layer.conv_width, *windows, 1) - 1
    blocks = 2 * devices
    if devices == 1 or tokens % (blocks * config.layer.segment_size) or tokens < blocks * reach:
        return None
    return TokenSplit(devices, paired=True)


def map_blocks(
    function: BlockFunction, split: TokenSplit, sharded: Tree, replicated: Tree = ()
) -> Tree:
    """Run a function on the blocks of each device; other mesh axes stay automatic.

    Args:
        function: called once per device, with the indices of its blocks [s], int32.
        split: the split of the tokens, in whose order `sharded` is.
        sharded: arrays [b, t, ...]; the function gets [b, t / P, ...].
        replicated: arrays that each device gets as a whole.

    Returns:
        arrays [b, P * x, ...] of the function's results [b, x, ...].
    """
    mapped = jax.shard_map(
        function,
        in_specs=(PartitionSpec(AXIS), _TOKENS, PartitionSpec()),
        out_specs=_TOKENS,
        axis_names={AXIS},
    )
    return mapped(jnp.asarray(split.order, jnp.int32), sharded, replicated)


def split_blocks(x: Array, blocks: Array) -> Array:
    """Reshape the tokens of a device [b, s * c, ...] to [b, s, c, ...]."""
    return x.reshape(x.shape[0], blocks.size, -1, *x.shape[2:])


def block_range(blocks: Array, size: int) -> Array:
    """Return the indices [s * size] of the elements of blocks [s] of `size` elements each."""
    inside = jnp.arange(size, dtype=blocks.dtype)
    return (blocks[:, None] * size + inside[None]).reshape(-1)


def take_blocks(x: Array, blocks: Array, split: TokenSplit, axis: int = 1) -> Array:
    """Return the segments of a device's blocks: [..., s * n, ...] of [..., blocks * n, ...].

    Args:
        x: arrays with all segments, in the order of the sequence, along `axis`.
        blocks: indices of the blocks [s].
        split: the split of the tokens.
        axis: axis of the segments.
    """
    n = x.shape[axis] // split.blocks
    parts = [jax.lax.dynamic_slice_in_dim(x, block * n, n, axis) for block in blocks]
    return jnp.concatenate(parts, axis)


def gather_blocks(x: Array, split: TokenSplit) -> Array:
    """Gather arrays [b, s * c, ...] of all devices, in the order of the sequence.

    Returns:
        [b, blocks * c, ...].
    """
    x = jax.lax.all_gather(x, AXIS, axis=1, tiled=True)
    if not split.paired:
        return x
    parts = x.reshape(x.shape[0], split.blocks, -1, *x.shape[2:])
    return jnp.take(parts, split.places, axis=1).reshape(x.shape)


def before_blocks(x: Array, blocks: Array, split: TokenSplit) -> Array:
    """Return `x` [b, s, ...] of the block before each block of a device; 0 before the first.

    One exchange with neighbouring devices in each direction that the split needs.
    """
    steps = [(i, i + 1) for i in range(split.devices - 1)]
    first = jax.lax.ppermute(x[:, :1], AXIS, steps)
    if not split.paired:
        return first
    # Block 2P - 1 - i follows a block of device i + 1, and the middle block P one of its own.
    second = jax.lax.ppermute(x[:, 1:], AXIS, [(i, j) for j, i in steps])
    is_middle = blocks[0] == split.devices - 1
    return jnp.concatenate([first, jnp.where(is_middle, x[:, :1], second)], axis=1)


@partial(jax.jit, static_argnames="split")
def to_paired(tree: Tree, split: TokenSplit) -> Tree:
    """Move tokens [b, t, ...] from the order of the sequence to that of a paired split."""
    return map_blocks(partial(_exchange, split=split, inverse=False), split, tree)


@partial(jax.jit, static_argnames="split")
def from_paired(tree: Tree, split: TokenSplit) -> Tree:
    """Undo `to_paired` for tokens [b, t, ...]."""
    return map_blocks(partial(_exchange, split=split, inverse=True), split, tree)


def _exchange(blocks: Array, tree: Tree, _: Tree, *, split: TokenSplit, inverse: bool) -> Tree:
    """Exchange half of each device's tokens [b, 2 c, ...] with another device.

    In the order of the sequence, device i has the blocks 2i and 2i + 1. Of the blocks with even
    index, a paired split has one on each device: the first one on even devices, the second one on
    odd devices. So one permutation of the devices moves all even blocks, another one all odd ones.
    """
    owner = split.places // 2
    moves = [list(enumerate(owner[parity::2].tolist())) for parity in (0, 1)]
    swapped = blocks[0] % 2 == 1

    def one(x: Array) -> Array:
        parts = split_blocks(x, blocks)
        if inverse:
            parts = jnp.where(swapped, parts[:, ::-1], parts)
        moved = [
            jax.lax.ppermute(parts[:, i], AXIS, [(b, a) for a, b in move] if inverse else move)
            for i, move in enumerate(moves)
        ]
        result = jnp.stack(moved, axis=1)
        if not inverse:
            result = jnp.where(swapped, result[:, ::-1], result)
        return result.reshape(x.shape)

    return jax.tree.map(one, tree)


@partial(jax.jit, static_argnames="split")
def convolve(xs: Sequence[Array], kernels: Sequence[Array], split: TokenSplit) -> tuple[Array, ...]:
    """Convolve several sequences causally, with one exchange of the tokens before each block.

    Args:
        xs: tokens, each [b, t, d].
        kernels: each [w, d], the last row for the token itself.
        split: the split of the tokens.
    """
    width = kernels[0].shape[0]
    split.check(xs[0].shape[1], reach=width - 1)

    def body(blocks: Array, xs: Sequence[Array], kernels: Sequence[Array]) -> tuple[Array, ...]:
        parts = jnp.concatenate([split_blocks(x, blocks) for x in xs], axis=-1)
        c = parts.shape[2]
        before = before_blocks(parts[:, :, c - width + 1 :], blocks, split)
        padded = jnp.concatenate([before, parts], axis=2)
        kernel = jnp.concatenate(kernels, axis=-1).astype(padded.dtype)
        taps = [
            padded[:, :, i : i + c] * expand_leading_dims(tap, 4) for i, tap in enumerate(kernel)
        ]
        y = sum(taps[1:], taps[0]).reshape(*xs[0].shape[:2], -1)
        ends = np.cumsum([x.shape[-1] for x in xs])[:-1]
        return tuple(jnp.split(y, ends, axis=-1))

    return map_blocks(body, split, tuple(xs), tuple(kernels))
