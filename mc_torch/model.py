"""Language model with pre-norm blocks, each a token mixer and a SwiGLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mc_core.argument_checks import check_tokens
from mc_core.cache_checks import INVALIDATED, check_extend_tokens
from mc_core.config import LayerConfig, ModelConfig
from mc_torch.attention import AttentionLayer
from mc_torch.cache import AnyCache
from mc_torch.cache_rows import invalidate_rows
from mc_torch.chunk_layout import first_tokens
from mc_torch.cross_entropy import LabelScores, label_scores
from mc_torch.ids import check_ids, cumulative_any, nan_where, safe_ids, safe_places
from mc_torch.inspection import Trace
from mc_torch.layer import MemoryCachingLayer
from mc_torch.log_linear_layer import LogLinearAttentionLayer
from mc_torch.mixer import extend_rows
from mc_torch.modules import (
    Hooked,
    Linear,
    RMSNorm,
    call_hooked,
    embedding_matrix,
    project,
)
from mc_torch.numerics import Array, Dtype, compute_dtype, einsum_f32, is_static, remat, take_along
from mc_torch.pretrained import Pretrained

# Token mixers by the class of their configuration; see `mc_core.config.MIXERS`.
LAYERS: dict[type, Callable[..., Any]] = {
    kind.config_class: kind
    for kind in (MemoryCachingLayer, AttentionLayer, LogLinearAttentionLayer)
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

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return Linear(in_features, out_features, device=device, dtype=dtype)

        self.gate_proj, self.up_proj, self.down_proj = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x: Array) -> Array:
        """Transform tokens [b, t, d] independently."""
        hidden = F.silu(project(self.gate_proj, x)) * project(self.up_proj, x)
        return project(self.down_proj, hidden)


class Block(nn.Module, Hooked):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`.

    Args:
        config: the model's configuration.
        layer: configuration of the block's mixer.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
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
        """Process the next tokens [b, t, d] of a stream; rows are padded after `count` [b]."""
        mixer = self.mixer
        y, cache = call_hooked(mixer, mixer._extend, self.mixer_norm(x), cache, mask, count)
        return self._transform(x + y), cache

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace | None]:
        """Process a whole sequence [b, t, d], and return the trace of the memory, if any."""
        y, trace = call_hooked(self.mixer, self.mixer._inspect, self.mixer_norm(x), mask)
        return self._transform(x + y), trace

    def _init_cache(self, x: None, *args: Any) -> tuple[None, AnyCache]:
        return call_hooked(self.mixer, self.mixer._init_cache, x, *args)

    def _transform(self, x: Array) -> Array:
        return x + self.ffn(self.ffn_norm(x)) if hasattr(self, "ffn") else x


class LanguageModel(nn.Module, Hooked, Pretrained):
    """Language model: token ids to next-token logits.

    The compute dtype of activations and matrix products is that of autocast if enabled, else that
    of the parameters.

    Args:
        config: the model's configuration.
        device: device of the parameters.
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
        """Return next-token logits at all tokens or at selected ones.

        Args:
            tokens: ids [b, t], integers of any dtype, each in `0..vocab_size - 1`.
            mask: bool [b, t], False at masked tokens, whose ids are ignored.
            places: integers [b, p], indices in `0..t - 1` of tokens at which to compute logits;
                None = all.

        Returns:
            logits [b, t or p, vocab_size], float32 (float64 if the model computes in float64).

        Raises:
            ValueError: an argument has a wrong shape or dtype, or an id or place is out of range. A
                compiled program cannot raise: a row is NaN from its first id out of range.
        """
        x, invalid = self._hidden(tokens, mask, places)
        return nan_where(invalid, self._logits(x))

    def score(
        self,
        tokens: Array,
        labels: Array,
        mask: Array | None = None,
        places: Array | None = None,
        read: Array | None = None,
    ) -> LabelScores:
        """Return losses of labels and the most likely ids, without the logits of all tokens.

        Args:
            tokens: as in `forward`.
            labels: ids [b, t or p] that the tokens, or those at `places`, predict.
            mask: as in `forward`.
            places: as in `forward`.
            read: bool [b, t or p], False at labels to ignore, with a loss of 0; None = read all.

        Returns:
            losses, float32 (float64 if the model computes in float64), and ids, int64, both
            [b, t or p]. A label that is read and out of range has the loss NaN.

        Raises:
            ValueError: see `forward`. In a compiled program, losses are NaN and ids -1 where the
                logits are NaN.
        """
        return LabelScores(*call_hooked(self, self._score, tokens, labels, mask, places, read))

    def inspect(
        self, tokens: Array, mask: Array | None = None
    ) -> tuple[Array, tuple[Trace | None, ...]]:
        """Return logits [b, t, vocab_size] and the trace of each block; None without memory.

        Args:
            tokens: as in `forward`.
            mask: as in `forward`.
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
        """Return empty caches of all blocks; arguments as in the layer's `init_cache`."""
        args = (batch, max_tokens, cache_dtype, cache_device)
        return call_hooked(self, self._init_cache, None, *args)[1]

    def grow(self, cache: tuple[AnyCache, ...], max_tokens: int) -> tuple[AnyCache, ...]:
        """Return caches with the same content and the capacity `max_tokens`."""
        blocks: Any = zip(self.blocks, cache, strict=True)
        return tuple(block.mixer.grow(block_cache, max_tokens) for block, block_cache in blocks)

    def extend(
        self,
        tokens: Array,
        cache: tuple[AnyCache, ...],
        mask: Array | None = None,
        *,
        padding: Array | None = None,
        check: bool = True,
    ) -> tuple[Array, tuple[AnyCache, ...]]:
        """Return logits of the next tokens of a stream. Any split equals a single full pass.

        Args:
            tokens: ids [b, t], integers of any dtype, each in `0..vocab_size - 1`.
            cache: state before these tokens, from `init_cache` or `extend`.
            mask: bool [b, t], False at masked tokens, which still advance the position.
            padding: bool [b, t], True at padding, which does not advance the position. The result
                of a row does not depend on its padding. Masked and padded ids are ignored.
            check: False skips the range check of ids, which synchronizes with the device. As in a
                compiled program, a row is then NaN from its first id out of range, including later
                calls.

        Returns:
            logits [b, t, vocab_size], and the cache after these tokens.

        Raises:
            ValueError: an argument has a wrong shape or dtype, an id is out of range, or the
                capacity of the cache is exceeded.
        """
        check_extend_tokens(tokens, cache, len(self.blocks), is_static)
        in_range = self._check(tokens, mask, padding, check)
        extend = partial(call_hooked, self, partial(self._extend, in_range=in_range))
        return extend_rows(extend, tokens, cache, mask, padding)

    def _score(
        self,
        tokens: Array,
        labels: Array,
        mask: Array | None,
        places: Array | None,
        read: Array | None,
    ) -> LabelScores:
        x, invalid = self._hidden(tokens, mask, places)
        size = self.config.vocab_size
        losses, best = label_scores(self._project, self.norm(x), labels, size, read)
        best = best if invalid is None else torch.where(invalid, -1, best)
        return LabelScores(nan_where(invalid, losses), best)

    def _hidden(
        self, tokens: Array, mask: Array | None, places: Array | None
    ) -> tuple[Array, Array | None]:
        """Return outputs of the last block [b, t or p, d], and the mask of logits to set to NaN."""
        ids, invalid = self._safe_ids(tokens, mask, self._check(tokens, mask))
        if places is not None:
            places, invalid = safe_places(places, invalid, ids.shape[1])
        x = self._embed(ids)
        for block in self.blocks:
            x = remat(block, str(self.config.remat))(x, mask)
        if places is not None:
            x = take_along(x, places[..., None], 1)
        return x, invalid

    def _inspect(self, tokens: Array, mask: Array | None) -> tuple[Array, tuple[Trace | None, ...]]:
        ids, invalid = self._safe_ids(tokens, mask, self._check(tokens, mask))
        x, traces = self._embed(ids), []
        blocks: Any = self.blocks
        for block in blocks:
            x, trace = call_hooked(block, block.inspect, x, mask)
            traces.append(trace)
        return nan_where(invalid, self._logits(x)), tuple(traces)

    def _init_cache(self, x: None, *args: Any) -> tuple[None, tuple[AnyCache, ...]]:
        blocks: Any = self.blocks
        return None, tuple(call_hooked(block, block._init_cache, x, *args)[1] for block in blocks)

    def _extend(
        self,
        tokens: Array,
        cache: tuple[AnyCache, ...],
        mask: Array | None,
        count: Array | None = None,
        in_range: bool = False,
    ) -> tuple[Array, tuple[AnyCache, ...]]:
        read = mask
        if count is not None:
            read = first_tokens(count, tokens.shape[1])
            read = read if mask is None else read & mask
        ids, invalid = self._safe_ids(tokens, read, in_range)
        x, new = self._embed(ids), []
        blocks: Any = zip(self.blocks, cache, strict=True)
        for block, block_cache in blocks:
            x, block_cache = call_hooked(block, block.extend, x, block_cache, mask, count)
            new.append(block_cache)
        if invalid is not None:
            invalid = invalid | (cache[0].position >= INVALIDATED)[:, None]
            new = [invalidate_rows(block_cache, invalid[:, -1]) for block_cache in new]
        return nan_where(invalid, self._logits(x)), tuple(new)

    def _check(
        self,
        tokens: Array,
        mask: Array | None,
        padding: Array | None = None,
        values: bool = True,
    ) -> bool:
        """Return True if ids are known to be in range; without `values`, check only the dtype."""
        read = check_tokens(tokens, mask, padding, is_static)
        return check_ids("tokens", tokens, self.config.vocab_size, read, values)

    def _safe_ids(
        self, tokens: Array, mask: Array | None, in_range: bool
    ) -> tuple[Array, Array | None]:
        """Return ids in range, and the mask of outputs to set to NaN, bool [b, t]; None = none."""
        ids, out_of_range = safe_ids(tokens, self.config.vocab_size, mask)
        return ids, None if in_range else cumulative_any(out_of_range)

    def _embed(self, tokens: Array) -> Array:
        x = self.embed(tokens)
        return x.to(compute_dtype(x))

    def _logits(self, x: Array) -> Array:
        return self._project(self.norm(x))

    def _project(self, x: Array) -> Array:
        """Map normalized tokens [b, t, d] to logits [b, t, vocab_size]."""
        if not self.config.tie_embeddings:
            return project(self.head, x, exact=True)
        weight = embedding_matrix(self.embed, self.config.vocab_size, x.device)
        return einsum_f32("btd,sd->bts", x, weight, dtype=x.dtype)
