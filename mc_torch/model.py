"""A language model of pre-norm blocks: memory or attention, then SwiGLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mc_core.arguments import check_tokens
from mc_core.cache_checks import ENDED, check_next_ids
from mc_core.config import AttentionConfig, MCConfig, ModelConfig
from mc_torch.attention import AttentionLayer
from mc_torch.cache import AnyCache
from mc_torch.grid import first_tokens
from mc_torch.ids import check_ids, from_first, nan_where, safe_ids, safe_places
from mc_torch.inspection import Trace
from mc_torch.layer import MemoryCachingLayer
from mc_torch.mixer import extend_rows
from mc_torch.modules import (
    Hooked,
    Linear,
    RMSNorm,
    call_hooked,
    embedding_matrix,
    project,
)
from mc_torch.numerics import Array, Dtype, compute_dtype, is_fixed, product, remat, take_along
from mc_torch.pretrained import Pretrained
from mc_torch.rows import end_rows

# What the blocks mix tokens with, by the class of its configuration; see `mc_core.config.MIXERS`.
LAYERS: dict[type, Callable[..., Any]] = {
    kind.config_class: kind for kind in (MemoryCachingLayer, AttentionLayer)
}


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

        def linear(into: int, out: int) -> nn.Linear:
            return Linear(into, out, device=device, dtype=dtype)

        self.gate_proj, self.up_proj, self.down_proj = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x: Array) -> Array:
        """Transform each token of [b, t, d] by itself."""
        hidden = F.silu(project(self.gate_proj, x)) * project(self.up_proj, x)
        return project(self.down_proj, hidden)


class Block(nn.Module, Hooked):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`.

    Args:
        config: the model's configuration.
        layer: that of the block's mixer.
        device: where the parameters are.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: MCConfig | AttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ):
        super().__init__()
        d = config.layer.d_model
        self.mixer_norm = RMSNorm(d, device=device, dtype=dtype)
        self.mixer = LAYERS[type(layer)](layer, device=device, dtype=dtype)
        if config.ffn_dim:
            self.ffn_norm = RMSNorm(d, device=device, dtype=dtype)
            self.ffn = SwiGLU(config, device=device, dtype=dtype)

    def forward(self, x: Array, mask: Array | None = None) -> Array:
        """Mix and transform tokens [b, t, d]; `mask` is bool [b, t]."""
        return self._transform(x + self.mixer(self.mixer_norm(x), mask))

    def extend(
        self, x: Array, cache: AnyCache, mask: Array | None = None, count: Array | None = None
    ) -> tuple[Array, AnyCache]:
        """Do the same for the next tokens of a stream, of which row i has its first `count[i]`."""
        mixer = self.mixer
        y, cache = call_hooked(mixer, mixer._extend, self.mixer_norm(x), cache, mask, count)
        return self._transform(x + y), cache

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace | None]:
        """Do the same for a whole sequence [b, t, d]; return the memory's trace, if any."""
        y, trace = call_hooked(self.mixer, self.mixer._inspect, self.mixer_norm(x), mask)
        return self._transform(x + y), trace

    def _init_cache(self, x: None, *args: Any) -> tuple[None, AnyCache]:
        return call_hooked(self.mixer, self.mixer._init_cache, x, *args)

    def _transform(self, x: Array) -> Array:
        return x + self.ffn(self.ffn_norm(x)) if hasattr(self, "ffn") else x


class LanguageModel(nn.Module, Hooked, Pretrained):
    """Token ids in, next-token logits out.

    The compute dtype of activations and matrix products is autocast's where it is on, else that of
    the parameters.

    Args:
        config: the model's configuration.
        device: where the parameters are.
        dtype: dtype of the parameters.
    """

    config_class = ModelConfig

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
            [Block(config, layer, device=device, dtype=dtype) for layer in config.block_layers]
        )
        self.norm = RMSNorm(d, device=device, dtype=dtype)
        if not config.tie_embeddings:
            self.head = Linear(d, config.vocab_size, device=device, dtype=dtype)

    def forward(
        self, tokens: Array, mask: Array | None = None, places: Array | None = None
    ) -> Array:
        """Predict the next token at every place, or at chosen ones.

        Args:
            tokens: ids [b, t], integers of any dtype, each in `0..vocab_size - 1`.
            mask: bool [b, t], True = a real token. The id of a masked one is not read.
            places: integers [b, p], each in `0..t - 1`; the head then computes no other logits.
                None = all.

        Returns:
            logits [b, t or p, vocab_size], float32 (float64 where the model computes in it).

        Raises:
            ValueError: a shape or dtype that does not fit, or an id or place out of range. A
                compiled program cannot raise: from an id out of range on, its row is NaN.
        """
        ids, lost = self._safe_ids(tokens, mask, self._check(tokens, mask))
        if places is not None:
            places, lost = safe_places(places, lost, ids.shape[1])
        x = self._embed(ids)
        for block in self.blocks:
            run = remat(block) if self.config.remat else block
            x = run(x, mask)
        if places is not None:
            x = take_along(x, places[..., None], 1)
        return nan_where(lost, self._logits(x))

    def inspect(
        self, tokens: Array, mask: Array | None = None
    ) -> tuple[Array, tuple[Trace | None, ...]]:
        """Return logits [b, t, vocab_size] and each block's trace; None where it has no memory.

        Args:
            tokens: as `forward` takes them.
            mask: as above.
        """
        return call_hooked(self, self._inspect, tokens, mask)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> tuple[AnyCache, ...]:
        """Return the caches of all blocks, for streams that have not begun; as the layer's."""
        args = (batch, max_tokens, cache_dtype, cache_device)
        return call_hooked(self, self._init_cache, None, *args)[1]

    def grow(self, cache: tuple[AnyCache, ...], max_tokens: int) -> tuple[AnyCache, ...]:
        """Return caches with the same content and room for `max_tokens` tokens."""
        blocks: Any = zip(self.blocks, cache, strict=True)
        return tuple(block.mixer.grow(one, max_tokens) for block, one in blocks)

    def extend(
        self,
        tokens: Array,
        cache: tuple[AnyCache, ...],
        mask: Array | None = None,
        *,
        padding: Array | None = None,
        check: bool = True,
    ) -> tuple[Array, tuple[AnyCache, ...]]:
        """Predict after the next tokens of a stream; any split gives what the whole gives.

        Args:
            tokens: ids [b, t], integers of any dtype, each in `0..vocab_size - 1`.
            cache: the stream so far, from `init_cache` or `extend`.
            mask: bool [b, t], True = a real token; a masked one still takes its position.
            padding: bool [b, t], True where a row has no token at all: each row gives what it gives
                alone without that place. Masked and padded ids are not read.
            check: False spares the check of ids, which waits for the device: as in a compiled
                program, a row is then NaN from an id out of range on, in later calls too.

        Returns:
            logits [b, t, vocab_size], and the stream with these tokens.

        Raises:
            ValueError: a shape or dtype that does not fit, an id out of range, or tokens that the
                cache has no room for.
        """
        check_next_ids(tokens, cache, len(self.blocks), is_fixed)
        known = self._check(tokens, mask, padding, check)
        extend = partial(call_hooked, self, partial(self._extend, known=known))
        return extend_rows(extend, tokens, cache, mask, padding)

    def _inspect(self, tokens: Array, mask: Array | None) -> tuple[Array, tuple[Trace | None, ...]]:
        ids, lost = self._safe_ids(tokens, mask, self._check(tokens, mask))
        x, traces = self._embed(ids), []
        blocks: Any = self.blocks
        for block in blocks:
            x, trace = call_hooked(block, block.inspect, x, mask)
            traces.append(trace)
        return nan_where(lost, self._logits(x)), tuple(traces)

    def _init_cache(self, x: None, *args: Any) -> tuple[None, tuple[AnyCache, ...]]:
        blocks: Any = self.blocks
        return None, tuple(call_hooked(block, block._init_cache, x, *args)[1] for block in blocks)

    def _extend(
        self,
        tokens: Array,
        cache: tuple[AnyCache, ...],
        mask: Array | None,
        count: Array | None = None,
        known: bool = False,
    ) -> tuple[Array, tuple[AnyCache, ...]]:
        read = mask
        if count is not None:
            read = first_tokens(count, tokens.shape[1])
            read = read if mask is None else read & mask
        ids, lost = self._safe_ids(tokens, read, known)
        x, new = self._embed(ids), []
        blocks: Any = zip(self.blocks, cache, strict=True)
        for block, one in blocks:
            x, one = call_hooked(block, block.extend, x, one, mask, count)
            new.append(one)
        if lost is not None:
            lost = lost | (cache[0].position >= ENDED)[:, None]
            new = [end_rows(one, lost[:, -1]) for one in new]
        return nan_where(lost, self._logits(x)), tuple(new)

    def _check(
        self,
        tokens: Array,
        mask: Array | None,
        padding: Array | None = None,
        values: bool = True,
    ) -> bool:
        """Return whether ids are known to be in range; without `values` check the dtype alone."""
        read = check_tokens(tokens, mask, padding, is_fixed)
        return check_ids("tokens", tokens, self.config.vocab_size, read, values)

    def _safe_ids(
        self, tokens: Array, read: Array | None, known: bool
    ) -> tuple[Array, Array | None]:
        """Return ids to look up, and where rows can only give NaN, bool [b, t]; None = nowhere."""
        ids, wrong = safe_ids(tokens, self.config.vocab_size, read)
        return ids, None if known else from_first(wrong)

    def _embed(self, tokens: Array) -> Array:
        x = self.embed(tokens)
        return x.to(compute_dtype(x))

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        if not self.config.tie_embeddings:
            return project(self.head, x, exact=True)
        weight = embedding_matrix(self.embed, self.config.vocab_size, x.device)
        return product("btd,sd->bts", x, weight, dtype=x.dtype)
