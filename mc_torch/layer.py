"""The Memory Caching layer: projections, write coefficients, heads, around `memory_caching`."""

from collections.abc import Sequence
from os import PathLike
from typing import Self

import torch
from torch import nn

from mc_core.config import MCConfig
from mc_torch.backends import Coefficients, Norm, Weights
from mc_torch.cache import Cache
from mc_torch.functional import Result, memory_caching
from mc_torch.inspection import Trace, make_trace
from mc_torch.layout import make_plan
from mc_torch.modules import Coefficient, Linear, MemoryNorm, RMSNorm, ShortConv, initial_memory
from mc_torch.numerics import Array, Dtype, compute_dtype, l2_normalize, state_dtype
from mc_torch.pretrained import from_pretrained


class MemoryCachingLayer(nn.Module):
    """A recurrent memory that caches its states, in the place of attention.

    The compute dtype of matrix products is autocast's where it is on, else that of the input; the
    memory's state is float32 at least.

    Args:
        config: the layer's configuration.
        device: where the parameters are.
        dtype: dtype of the parameters.

    Example:
        >>> config = MCConfig(d_model=128, num_heads=4, memory=TitansConfig(), segment_size=64)
        >>> layer = MemoryCachingLayer(config)
        >>> y = layer(x)  # [b, t, 128] -> [b, t, 128]
    """

    def __init__(
        self,
        config: MCConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.config = config
        d, h, width = config.d_model, config.num_heads, config.head_dim

        def linear() -> Linear:
            return Linear(d, d, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(), linear(), linear()
        if config.gated and not config.use_q_as_u:
            self.u_proj = linear()
        self.out_proj = linear()
        if config.conv_width:
            self.q_conv = ShortConv(config.conv_width, d, device=device, dtype=dtype)
            self.k_conv = ShortConv(config.conv_width, d, device=device, dtype=dtype)
            self.v_conv = ShortConv(config.conv_width, d, device=device, dtype=dtype)
        self.coefficients = nn.ModuleDict(
            {
                name: Coefficient(config, name, device=device, dtype=dtype)
                for name in config.memory.ranges
            }
        )
        self.initial = nn.ParameterList(initial_memory(config, device, dtype))
        if getattr(config.memory, "norm", "none") == "layer":
            self.memory_norm = MemoryNorm(h, width, device=device, dtype=dtype)
        if config.output_norm == "rms":
            self.output_norm = RMSNorm(h, width, device=device, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ) -> Self:
        """Build from a safetensors file; `dtype` None = the file's.

        Raises:
            ValueError: the file is damaged, or holds something else: lists all that is wrong.
            OSError: the file cannot be read.
        """
        return from_pretrained(cls, MCConfig, path, device=device, dtype=dtype)

    def forward(
        self,
        x: Array,
        mask: Array | None = None,
        segment_lengths: Sequence[int] | None = None,
    ) -> Array:
        """Mix tokens.

        Args:
            x: [b, t, d].
            mask: bool [b, t], True = a real token; the output of a masked one is 0.
            segment_lengths: explicit lengths that cover t.

        Returns:
            [b, t, d] in the dtype of `x`.
        """
        return self._run(x, mask, segment_lengths)[0]

    def forward_with_cache(self, x: Array, mask: Array | None = None) -> tuple[Array, Cache]:
        """Mix tokens, and return the cached memories, their pools and lengths too."""
        y, result = self._run(x, mask)
        return y, result.cache

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace]:
        """Mix tokens, and return what their reads weighed and what their writes did."""
        y, result = self._run(x, mask, inspect=True)
        assert result.inner is not None
        plan = make_plan(x.shape[1], self.config, None, x.device)
        return y, make_trace(result.gates, result.cache.segments, result.inner, plan)

    def _run(
        self,
        x: Array,
        mask: Array | None,
        segment_lengths: Sequence[int] | None = None,
        inspect: bool = False,
    ) -> tuple[Array, Result]:
        config = self.config
        if x.ndim != 3 or x.shape[-1] != config.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be [b, t, {config.d_model}]")
        dtype = x.dtype
        x = x.to(compute_dtype(x))
        if mask is not None:
            x = torch.where(mask[:, :, None], x, torch.zeros_like(x))
        q, k, v, u = self._project(x)
        at = {name: coefficient(x) for name, coefficient in self.coefficients.items()}
        norm: Norm = None
        if hasattr(self, "memory_norm"):
            norm = (self.memory_norm.scale, self.memory_norm.bias)
        result = memory_caching(
            q,
            k,
            v,
            u,
            self._initial(),
            Coefficients(
                step=at["newest"] if "newest" in at else at["step"],
                retention=at["retention"],
                momentum=at.get("momentum"),
                previous=at.get("previous"),
            ),
            config,
            mask=mask,
            segment_lengths=segment_lengths,
            norm=norm,
            inspect=inspect,
        )
        y = result.output
        if config.output_norm == "rms":
            y = self.output_norm(y)
        y = self.out_proj(y.reshape(*y.shape[:2], config.d_model))
        return y.to(dtype), result

    def _project(self, x: Array) -> tuple[Array, Array, Array, Array | None]:
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.conv_width:
            q, k, v = self.q_conv(q), self.k_conv(k), self.v_conv(v)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if config.normalizes_qk:
            q, k = l2_normalize(q), l2_normalize(k)
        if not config.gated:
            return q, k, v, None
        return q, k, v, q if config.use_q_as_u else self._heads(self.u_proj(x))

    def _initial(self) -> Weights:
        if len(self.initial):
            return tuple(self.initial)
        h, width = self.config.num_heads, self.config.head_dim
        weight = self.out_proj.weight
        return (
            torch.zeros(h, width, width, device=weight.device, dtype=state_dtype(weight.dtype)),
        )

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)
