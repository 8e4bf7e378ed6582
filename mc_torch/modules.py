"""Submodules of the layers, and calls of wrapped or replaced modules."""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from mc_core.config import MCConfig
from mc_core.log_linear import LogLinearConfig
from mc_torch.numerics import (
    Array,
    Dtype,
    autocasts,
    einsum_f32,
    expand_leading_dims,
    rms_norm,
    state_dtype,
)

START_MARGIN = 1e-3  # minimum distance of initial coefficients from the ends, relative to the range


def Linear(
    in_features: int,
    out_features: int,
    *,
    device: torch.device | str | None = None,
    dtype: Dtype = None,
) -> nn.Linear:
    """Return an `nn.Linear` without bias, initialized as in Flax (LeCun normal).

    This is not a subclass, because `quantize_dynamic` skips subclasses. Call it through `project`.
    """
    # On the meta device, the constructor draws no random numbers.
    linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    # The divisor is the standard deviation of a normal truncated at 2 standard deviations.
    std = in_features**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    return linear


def project(linear: nn.Module, x: Array, *, exact: bool = False) -> Array:
    """Call a linear map with its weights in the dtype of `x`.

    Args:
        linear: an `nn.Linear`, or its replacement: with adapters, quantized or sharded.
        x: [..., in].
        exact: accumulate in the state dtype and return it, as `numerics.einsum_f32` does.

    Returns:
        [..., out] in the dtype of `x`, or its state dtype.
    """
    out = state_dtype(x.dtype) if exact else x.dtype
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Array):  # quantized and packed, with float32 compute
        return linear(x.float()).to(out)
    if weight.dtype == x.dtype == out:
        return linear(x)
    if not exact and autocasts(x) and torch.float64 not in (x.dtype, weight.dtype):
        return linear(x).to(out)
    weights = _cast_weights(linear, x.dtype, out)
    if not weights:
        return linear(x).to(out)
    if not autocasts(x):
        return functional_call(linear, weights, (x.to(out),))
    with torch.autocast(x.device.type, enabled=False):
        return functional_call(linear, weights, (x.to(out),))


def embedding_matrix(embed: nn.Module, rows: int, device: torch.device) -> Array:
    """Return the weights [rows, d] of an embedding or its replacement."""
    if type(embed) is nn.Embedding and not _is_distributed(embed.weight):
        return embed.weight
    # A replacement (with adapters, quantized, sharded) returns its weights by looking up all ids.
    return embed(torch.arange(rows, device=device))


class Hooked:
    """Base class of modules with methods, other than `forward`, that run its hooks."""

    def _call(self, method: Callable[..., Any], x: Array | None) -> Any:
        return method(x)


def call_hooked(
    module: Any, method: Callable[..., tuple[Any, Any]], x: Array | None, *args: Any
) -> tuple[Any, Any]:
    """Return `method(x, *args)`, run with the hooks of `fully_shard` for `forward`.

    Args:
        module: a `Hooked` module, or a wrapper that forwards attributes to one.
        method: method of that module that returns a pair.
        x: first argument [b, t, ...]. FSDP casts it and the first result by its policy.
        args: other arguments. FSDP does not process them, so a cache keeps its dtypes and devices.
    """
    if not _is_sharded(module):
        return method(x, *args)
    results: list[tuple[Any, Any]] = []

    def call(x: Array | None) -> tuple[Any, Any]:
        results.append(method(x, *args))
        return results[0]

    y, _ = module._call(call, x)
    return y, results[0][1]


def _is_sharded(module: nn.Module) -> bool:
    """Return True if FSDP shards a module or the module it wraps; registers `_call` if needed."""
    kind, sharded = _imported("torch.distributed.fsdp", "FSDPModule"), False
    if not kind:
        return False
    from torch.distributed.fsdp import register_fsdp_forward_method

    while True:
        if isinstance(module, kind):
            sharded = True
            if not hasattr(module._call, "__wrapped__"):
                register_fsdp_forward_method(module, "_call")
        wrapped = list(module.children())
        if isinstance(module, Hooked) or len(wrapped) != 1:
            return sharded
        module = wrapped[0]


def _is_distributed(x: Array) -> bool:
    return isinstance(x, _imported("torch.distributed.tensor", "DTensor"))


def _imported(module: str, name: str) -> Any:
    """Return a class of a module that is slow to import, or () if it has not been imported."""
    return getattr(sys.modules.get(module), name, ())


def _cast_weights(linear: nn.Module, dtype: torch.dtype, out: torch.dtype) -> dict[str, Array]:
    """Return a module's floating-point parameters, cast to `dtype`, then to `out`.

    Skips parameters that are distributed, or replaced by the hooks of FSDP.
    """
    if isinstance(linear, _imported("torch.distributed.fsdp", "FSDPModule")):
        return {}
    return {
        ".".join(filter(None, (path, name))): parameter.to(dtype).to(out)
        for path, module in linear.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and not _is_distributed(parameter)
    }


class Coefficient(nn.Module):
    """A write coefficient: constant, or a scaled sigmoid of a bias or of the token (section 2).

    Args:
        config: the layer's configuration.
        name: field of the memory configuration that sets the constant or initial value.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: MCConfig | LogLinearConfig,
        name: str,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        memory = config.memory
        self.mode = memory.coefficient_mode
        self.start = float(getattr(memory, name))
        self.low, self.high = memory.coefficient_range(name)
        fraction = (self.start - self.low) / (self.high - self.low)
        fraction = min(max(fraction, START_MARGIN), 1 - START_MARGIN)
        self.heads = config.num_heads
        if self.mode == "constant":
            return
        bias = float(np.log(fraction) - np.log1p(-fraction))
        self.bias = nn.Parameter(torch.full((self.heads,), bias, device=device, dtype=dtype))
        if self.mode == "token":
            shape = (self.heads, config.d_model)
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Array) -> Array:
        """Return the coefficient [b, t, h] of tokens [b, t, d], in the state dtype."""
        dtype = state_dtype(x.dtype)
        shape = (*x.shape[:2], self.heads)
        if self.mode == "constant":
            return torch.full(shape, self.start, device=x.device, dtype=dtype)
        logit = expand_leading_dims(self.bias.to(dtype), 3).expand(shape)
        if self.mode == "token":
            logit = logit + einsum_f32("btd,hd->bth", x, self.weight, dtype=x.dtype)
        return self.low + (self.high - self.low) * torch.sigmoid(logit)


class ShortConv(nn.Module):
    """Causal depthwise convolution (Titans, section 4.4), initialized to the identity."""

    def __init__(
        self,
        width: int,
        features: int,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        weight = torch.zeros(features, width, device=device, dtype=dtype)
        weight[:, -1] = 1
        self.weight = nn.Parameter(weight)

    def forward(self, x: Array, before: Array | None = None) -> Array:
        """Convolve tokens [b, t, d] over t, after `before` [b, width - 1, d] or zeros."""
        weight, t = self.weight.to(x.dtype), x.shape[1]
        padded = self._with_before(x, before)
        taps = [
            padded[:, i : i + t] * expand_leading_dims(tap, 3)
            for i, tap in enumerate(weight.unbind(1))
        ]
        return sum(taps[1:], taps[0])

    def tail(self, x: Array, before: Array | None = None, count: Array | None = None) -> Array:
        """Return the argument `before` [b, width - 1, d] of the next call, in the state dtype.

        Args:
            x: tokens [b, t, d].
            before: last inputs of the previous call.
            count: number of tokens per row, int32 [b]; later tokens are padding. None = no padding.
        """
        joined = self._with_before(x, before).to(state_dtype(x.dtype))
        if count is None:
            # Clone, because a view would retain the storage of all tokens.
            return joined[:, x.shape[1] :].clone(memory_format=torch.contiguous_format)
        width = self.weight.shape[1]
        index = count[:, None] + expand_leading_dims(torch.arange(width - 1, device=x.device), 2)
        return torch.gather(joined, 1, index[..., None].expand(-1, -1, x.shape[2]))

    def _with_before(self, x: Array, before: Array | None) -> Array:
        if before is None:
            return F.pad(x, (0, 0, self.weight.shape[1] - 1, 0))
        return torch.cat([before.to(x.dtype), x], dim=1)


class RMSNorm(nn.Module):
    """RMS norm over the last axis, with a learned scale of the given shape.

    Unlike in `nn.RMSNorm`, the parameter is named `scale`, as in NNX.
    """

    def __init__(self, *shape: int, device: torch.device | str | None = None, dtype: Dtype = None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def forward(self, x: Array) -> Array:
        """Normalize `x` [..., *shape]."""
        return rms_norm(x, self.scale)


class MemoryNorm(nn.Module):
    """Gain and bias of a memory's layer norm; not updated by the inner loop."""

    def __init__(
        self,
        heads: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(heads, width, device=device, dtype=dtype))


def split_heads(x: Array, heads: int) -> Array:
    """Reshape [b, t, d] to [b, t, h, d / h]."""
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads)


def initial_memory(
    config: MCConfig, device: torch.device | str | None = None, dtype: Dtype = None
) -> list[nn.Parameter]:
    """Return the parameters W_0, each [h, out, in]; empty if they are not learned."""
    memory, h, width = config.memory, config.num_heads, config.head_dim
    if not memory.learns_initial:
        return []
    shapes = [(h, o, i) for i, o in pairwise(memory.widths(width, width))]
    return [
        nn.Parameter(DRAWS[how](torch.zeros(shape, device=device, dtype=dtype)))
        for how, shape in zip(memory.initial_draws(len(shapes)), shapes, strict=True)
    ]


def _zero(weights: Array) -> Array:
    return weights


def _normal(weights: Array) -> Array:
    return torch.randn_like(weights) * weights.shape[-1] ** -0.5


def _orthogonal(weights: Array) -> Array:
    """Draw in at least float32, because QR decompositions have no bfloat16."""
    _, o, i = weights.shape
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    for head in wide:
        nn.init.orthogonal_(head, max(1.0, o / i) ** 0.5)
    return wide.to(weights.dtype)


DRAWS = {"zero": _zero, "normal": _normal, "orthogonal": _orthogonal}
