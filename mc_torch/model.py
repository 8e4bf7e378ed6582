"""A language model of pre-norm blocks: Memory Caching layer, then SwiGLU."""

from os import PathLike
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from mc_core.config import ModelConfig
from mc_torch.inspection import Trace
from mc_torch.layer import MemoryCachingLayer
from mc_torch.modules import Linear, RMSNorm
from mc_torch.numerics import Array, Dtype, compute_dtype, product, remat
from mc_torch.pretrained import from_pretrained


class SwiGLU(nn.Module):
    """Gated feed-forward `W_down (silu(W_gate x) * W_up x)`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        d, f = config.layer.d_model, config.ffn_dim

        def linear(into: int, out: int) -> Linear:
            return Linear(into, out, device=device, dtype=dtype)

        self.gate_proj, self.up_proj, self.down_proj = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x: Array) -> Array:
        """Transform each token of [b, t, d] by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """`x + memory(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        d = config.layer.d_model
        self.mixer_norm = RMSNorm(d, device=device, dtype=dtype)
        self.mixer = MemoryCachingLayer(config.layer, device=device, dtype=dtype)
        self.ffn_norm = RMSNorm(d, device=device, dtype=dtype)
        self.ffn = SwiGLU(config, device=device, dtype=dtype)

    def forward(self, x: Array, mask: Array | None = None) -> Array:
        """Mix and transform tokens [b, t, d]; `mask` is bool [b, t]."""
        x = x + self.mixer(self.mixer_norm(x), mask)
        return x + self.ffn(self.ffn_norm(x))

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace]:
        """Do the same, and return the mixer's trace."""
        y, trace = self.mixer.inspect(self.mixer_norm(x), mask)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), trace


class LanguageModel(nn.Module):
    """Token ids in, next-token logits out.

    The compute dtype of activations and matrix products is autocast's where it is on, else that of
    the parameters.

    Args:
        config: the model's configuration.
        device: where the parameters are.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        self.config = config
        d = config.layer.d_model
        self.embed = nn.Embedding(config.vocab_size, d, device=device, dtype=dtype)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(
            [Block(config, device=device, dtype=dtype) for _ in range(config.num_layers)]
        )
        self.norm = RMSNorm(d, device=device, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Linear(d, config.vocab_size, device=device, dtype=dtype)

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
        return from_pretrained(cls, ModelConfig, path, device=device, dtype=dtype)

    def forward(self, tokens: Array, mask: Array | None = None) -> Array:
        """Predict the next token at every place.

        Args:
            tokens: ids [b, t], integers below `vocab_size`.
            mask: bool [b, t], True = a real token.

        Returns:
            logits [b, t, vocab_size], float32 (float64 where the model computes in it).
        """
        x = self._embed(tokens)
        for block in self.blocks:
            run = remat(block) if self.config.remat else block
            x = run(x, mask)
        return self._logits(x)

    def inspect(self, tokens: Array, mask: Array | None = None) -> tuple[Array, tuple[Trace, ...]]:
        """Predict, and return the trace of every block's memory layer."""
        x, traces = self._embed(tokens), []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, trace = block.inspect(x, mask)
            traces.append(trace)
        return self._logits(x), tuple(traces)

    def _embed(self, tokens: Array) -> Array:
        x = self.embed(tokens)
        return x.to(compute_dtype(x))

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        return product("btd,sd->bts", x, weight, dtype=x.dtype)
