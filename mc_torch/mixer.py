"""What all mixers of tokens have in common: projections into and out of heads, and padded rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mc_core.cache_checks import caches_of
from mc_core.checks import check_flags
from mc_core.config import AttentionConfig, MCConfig
from mc_torch.backends import Weights
from mc_torch.cache import check_room
from mc_torch.grid import make_packing, pack, unpack
from mc_torch.inspection import Trace
from mc_torch.modules import Hooked, Linear, RMSNorm, ShortConv, project, split_heads
from mc_torch.numerics import Array, Dtype, compute_dtype, state_dtype
from mc_torch.pretrained import Pretrained


class Mixer(nn.Module, Hooked, Pretrained):
    """Brings tokens to q, k and v of heads, and reads of heads back to tokens.

    The compute dtype of matrix products is autocast's where it is on, else that of the input.

    Args:
        config: the layer's configuration.
        projects_u: whether there is a connector's projection, too.
        device: where the parameters are.
        dtype: dtype of the parameters.
    """

    config: MCConfig | AttentionConfig

    def __init__(
        self,
        config: MCConfig | AttentionConfig,
        *,
        projects_u: bool = False,
        device: torch.device | str | None,
        dtype: Dtype,
    ):
        super().__init__()
        self.config = config
        d, width = config.d_model, config.conv_width

        def linear() -> nn.Linear:
            return Linear(d, d, device=device, dtype=dtype)

        # A seed's draws follow this order.
        self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
        if projects_u:
            self.u_proj = linear()
        self.out_proj = linear()
        if width:
            self.q_conv = ShortConv(width, d, device=device, dtype=dtype)
            self.k_conv = ShortConv(width, d, device=device, dtype=dtype)
            self.v_conv = ShortConv(width, d, device=device, dtype=dtype)

    def _add_output_norm(self, *, device: torch.device | str | None, dtype: Dtype) -> None:
        """Come last of all parameters: optimisers of PyTorch know them by their order."""
        config = self.config
        if config.output_norm == "rms":
            shape = config.num_heads, config.head_dim
            self.output_norm = RMSNorm(*shape, device=device, dtype=dtype)

    def _start_conv(self, batch: int) -> Weights:
        """Return the `conv` of a cache before the first token."""
        if not self.config.conv_width:
            return ()
        shape = (3, batch, self.config.conv_width - 1, self.config.d_model)
        dtype, device = self._state_kind()
        return tuple(torch.zeros(shape, dtype=dtype, device=device))

    def _state_kind(self) -> tuple[torch.dtype, torch.device]:
        """Return the state dtype and the device of the parameters."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return state_dtype(parameter.dtype), parameter.device
        return torch.float32, torch.device("cpu")  # all are packed by quantisation for the CPU

    def _inspect(self, x: Array, mask: Array | None) -> tuple[Array, Trace | None]:
        """Mix tokens, and return the memory's trace; None where the mixer has no memory."""
        return self(x, mask), None

    def _enter(self, x: Array, mask: Array | None) -> Array:
        """Return tokens [b, t, d] in the compute dtype, zero where `mask` [b, t] is False."""
        x = x.to(compute_dtype(x))
        return x if mask is None else torch.where(mask[:, :, None], x, torch.zeros_like(x))

    def _qkv(
        self, x: Array, before: Weights, count: Array | None
    ) -> tuple[Array, Array, Array, Weights]:
        """Project tokens to q, k and v, by way of the convolutions where there are any.

        Args:
            x: tokens [b, t, d].
            before: the cache's `conv`.
            count: tokens of each row, its first ones, int32 [b]; None = all.

        Returns:
            q, k and v, each [b, t, h, k], and the `conv` of the cache after these tokens.
        """
        q, k, v = project(self.q_proj, x), project(self.k_proj, x), project(self.v_proj, x)
        tails: Weights = ()
        if self.config.conv_width:
            convs = self.q_conv, self.k_conv, self.v_conv
            old = before or (None, None, None)
            tails = tuple(
                conv.tail(x, b, count) for conv, x, b in zip(convs, (q, k, v), old, strict=True)
            )
            q, k, v = (conv(x, b) for conv, x, b in zip(convs, (q, k, v), old, strict=True))
        q, k, v = (split_heads(x, self.config.num_heads) for x in (q, k, v))
        return q, k, v, tails

    def _leave(self, y: Array, dtype: Dtype) -> Array:
        """Norm reads [b, t, h, v], merge their heads and project them to [b, t, d] of `dtype`."""
        if self.config.output_norm == "rms":
            y = self.output_norm(y)
        return project(self.out_proj, y.reshape(*y.shape[:2], self.config.d_model)).to(dtype)


def extend_rows(
    extend: Callable[..., tuple[Array, Any]],
    x: Array,
    cache: Any,
    mask: Array | None,
    padding: Array | None,
) -> tuple[Array, Any]:
    """Go on with streams, each row with as many tokens as it has.

    Args:
        extend: takes tokens that stand on the left of their rows, `cache`, their mask and, where
            rows differ, how many each row has, int32 [b]; returns outputs [b, t, ...] and a cache.
        x: tokens [b, t, ...].
        cache: a mixer's, or one of each block, all at the same positions.
        mask: bool [b, t], True = a real token.
        padding: bool [b, t], True where a row has no token at all; None = nowhere.

    Returns:
        the outputs, at the places of their tokens, and the cache after them.

    Raises:
        ValueError: the cache has no room for the tokens, or a mask or padding does not fit them.
    """
    check_flags("mask", mask, x.shape[:2])
    check_flags("padding", padding, x.shape[:2])
    first = caches_of(cache)[0]
    if padding is None:
        check_room(first, x.shape[1])
        return extend(x, cache, mask)
    packing = make_packing(padding)
    check_room(first, packing.tokens)
    mask = None if mask is None else pack(mask, packing)
    y, cache = extend(pack(x, packing), cache, mask, packing.tokens)
    return unpack(y, packing), cache
