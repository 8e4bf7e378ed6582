"""A language model of pre-norm blocks: memory or attention, then SwiGLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mc_core.arguments import check_tokens
from mc_core.cache_checks import ENDED, check_next_ids
from mc_core.config import AttentionConfig, MCConfig, ModelConfig
from mc_jax.attention import AttentionLayer
from mc_jax.cache import AnyCache
from mc_jax.grid import first_tokens
from mc_jax.ids import check_ids, from_first, nan_where, safe_ids, safe_places
from mc_jax.inspection import Trace
from mc_jax.layer import MemoryCachingLayer
from mc_jax.mixer import extend_rows
from mc_jax.modules import Head, Linear, RMSNorm
from mc_jax.numerics import Array, Dtype, is_fixed, product
from mc_jax.pretrained import Pretrained
from mc_jax.rows import end_rows

# What the blocks mix tokens with, by the class of its configuration; see `mc_core.config.MIXERS`.
LAYERS: dict[type, Callable[..., Any]] = {
    kind.config_class: kind for kind in (MemoryCachingLayer, AttentionLayer)
}


class SwiGLU(nnx.Module):
    """Gated feed-forward `W_down (silu(W_gate x) * W_up x)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Dtype):
        d, f = config.layer.d_model, config.ffn_dim
        self.gate_proj = Linear(d, f, rngs=rngs, param_dtype=param_dtype)
        self.up_proj = Linear(d, f, rngs=rngs, param_dtype=param_dtype)
        self.down_proj = Linear(f, d, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        """Transform each token of [b, t, d] by itself."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`.

    Args:
        config: the model's configuration.
        layer: that of the block's mixer.
        rngs: draws the parameters (stream `params`).
        dtype: compute dtype of matrix products.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: MCConfig | AttentionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
    ):
        d = config.layer.d_model
        self.mixer_norm = RMSNorm(d, param_dtype=param_dtype)
        self.mixer = LAYERS[type(layer)](layer, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        if config.ffn_dim:
            self.ffn_norm = RMSNorm(d, param_dtype=param_dtype)
            self.ffn = SwiGLU(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Mix and transform tokens [b, t, d]; `mask` is bool [b, t]."""
        return self._transform(x + self.mixer(self.mixer_norm(x), mask))

    def extend(
        self, x: Array, cache: AnyCache, mask: Array | None = None, count: Array | None = None
    ) -> tuple[Array, AnyCache]:
        """Do the same for the next tokens of a stream, of which row i has its first `count[i]`."""
        y, cache = self.mixer._extend(self.mixer_norm(x), cache, mask, count)
        return self._transform(x + y), cache

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace | None]:
        """Do the same for a whole sequence [b, t, d]; return the memory's trace, if any."""
        y, trace = self.mixer._inspect(self.mixer_norm(x), mask)
        return self._transform(x + y), trace

    def _transform(self, x: Array) -> Array:
        return x + self.ffn(self.ffn_norm(x)) if hasattr(self, "ffn") else x


class LanguageModel(nnx.Module, Pretrained):
    """Token ids in, next-token logits out.

    Args:
        config: the model's configuration.
        rngs: draws the parameters (stream `params`).
        dtype: compute dtype of activations and matrix products; None = `param_dtype`.
        param_dtype: dtype of the parameters.
    """

    config_class = ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
    ):
        self.config = config
        self.dtype = param_dtype if dtype is None else dtype
        d = config.layer.d_model
        self.embed = nnx.Embed(
            config.vocab_size,
            d,
            embedding_init=nnx.initializers.normal(0.02),
            param_dtype=param_dtype,
            dtype=self.dtype,
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [
                Block(config, layer, rngs=rngs, dtype=self.dtype, param_dtype=param_dtype)
                for layer in config.block_layers
            ]
        )
        self.norm = RMSNorm(d, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = Head(d, config.vocab_size, rngs=rngs, param_dtype=param_dtype)

    def __call__(
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
        x = self.embed(ids)
        for block in self.blocks:
            x = _remat(block, x, mask) if self.config.remat else block(x, mask)
        if places is not None:
            x = jnp.take_along_axis(x, places[..., None], axis=1)
        return nan_where(lost, self._logits(x))

    def inspect(
        self, tokens: Array, mask: Array | None = None
    ) -> tuple[Array, tuple[Trace | None, ...]]:
        """Return logits [b, t, vocab_size] and each block's trace; None where it has no memory.

        Args:
            tokens: as `__call__` takes them.
            mask: as above.
        """
        ids, lost = self._safe_ids(tokens, mask, self._check(tokens, mask))
        x, traces = self.embed(ids), []
        for block in self.blocks:
            x, trace = block.inspect(x, mask)
            traces.append(trace)
        return nan_where(lost, self._logits(x)), tuple(traces)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> tuple[AnyCache, ...]:
        """Return the caches of all blocks, for streams that have not begun; as the layer's."""
        return tuple(
            block.mixer.init_cache(
                batch, max_tokens, cache_dtype=cache_dtype, cache_device=cache_device
            )
            for block in self.blocks
        )

    def grow(self, cache: tuple[AnyCache, ...], max_tokens: int) -> tuple[AnyCache, ...]:
        """Return caches with the same content and room for `max_tokens` tokens."""
        blocks = zip(self.blocks, cache, strict=True)
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
        return extend_rows(partial(self._extend, known=known), tokens, cache, mask, padding)

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
        x, new = self.embed(ids), []
        for block, one in zip(self.blocks, cache, strict=True):
            x, one = block.extend(x, one, mask, count)
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

    def _logits(self, x: Array) -> Array:
        x = self.norm(x)
        if self.config.tie_embeddings:
            return product("btd,sd->bts", x, self.embed.embedding[...], dtype=x.dtype)
        return self.head(x)


@nnx.remat
def _remat(block: nnx.Module, x: Array, mask: Array | None) -> Array:
    """Recompute a block in the backward pass in place of keeping what it computed."""
    return block(x, mask)
