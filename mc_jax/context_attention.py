"""Keys and values of attention over split tokens, of one device (see `mc_jax.context`)."""

import jax.numpy as jnp

from mc_jax.context import TokenSplit, before_blocks, gather_blocks, split_blocks
from mc_jax.numerics import Array


def gather_keys(k: Array, v: Array, mask: Array, split: TokenSplit) -> tuple[Array, Array, Array]:
    """Gather keys [b, s * c, h, k], values and mask [b, s * c] of all devices, as one array.

    Returns:
        the arguments of all t tokens, in the order of the sequence.
    """
    return _unpack(gather_blocks(_pack(k, v, mask), split), k.shape[-1])


def with_window(
    k: Array, v: Array, mask: Array, blocks: Array, reach: int, split: TokenSplit
) -> tuple[Array, Array, Array]:
    """Prepend the `reach` tokens before each block, from one exchange with neighbours.

    Takes keys [b, s * c, h, k], values and mask [b, s * c]; returns [b, s, reach + c, ...]. Tokens
    before the sequence are masked.
    """
    keys = split_blocks(_pack(k, v, mask), blocks)
    before = before_blocks(keys[:, :, keys.shape[2] - reach :], blocks, split)
    return _unpack(jnp.concatenate([before, keys], axis=2), k.shape[-1])


def _pack(k: Array, v: Array, mask: Array) -> Array:
    """Concatenate [..., h, k], [..., h, v] and a mask [...]."""
    mask = jnp.broadcast_to(mask[..., None, None], (*k.shape[:-1], 1)).astype(k.dtype)
    return jnp.concatenate([k, v, mask], axis=-1)


def _unpack(x: Array, width: int) -> tuple[Array, Array, Array]:
    """Undo `_pack` for keys of a width."""
    return x[..., :width], x[..., width:-1], x[..., 0, -1] > 0
