"""Language model with pre-norm blocks, each a token mixer and a SwiGLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from mc_core.argument_checks import check_tokens
from mc_core.cache_checks import INVALIDATED, check_extend_tokens
from mc_core.config import LayerConfig, ModelConfig
from mc_jax.attention import AttentionLayer
from mc_jax.block_scan import scan_blocks
from mc_jax.cache import AnyCache
from mc_jax.cache_rows import invalidate_rows
from mc_jax.chunk_layout import first_tokens
from mc_jax.context import TokenSplit, from_paired, paired_split, to_paired
from mc_jax.cross_entropy import LabelScores, label_scores
from mc_jax.head_copies import apply_to, copy_to_heads
from mc_jax.ids import check_ids, cumulative_any, nan_where, safe_ids, safe_places
from mc_jax.inspection import Trace
from mc_jax.layer import MemoryCachingLayer
from mc_jax.log_linear_layer import LogLinearAttentionLayer
from mc_jax.mixer import extend_rows
from mc_jax.modules import Head, Linear, RMSNorm
from mc_jax.numerics import Array, Dtype, einsum_f32, is_static
from mc_jax.pretrained import Pretrained
from mc_jax.sharding import FREE, constrain, with_auto_axes
from mc_jax.width import axes_metadata, gather_width, gather_widths

# Token mixers by the class of their configuration; see `mc_core.config.MIXERS`.
LAYERS: dict[type, Callable[..., Any]] = {
    kind.config_class: kind
    for kind in (MemoryCachingLayer, AttentionLayer, LogLinearAttentionLayer)
}


class SwiGLU(nnx.Module):
    """Gated feed-forward `W_down (silu(W_gate x) * W_up x)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Dtype):
        d, f = config.layer.d_model, config.ffn_dim
        options = {"rngs": rngs, "param_dtype": param_dtype}
        self.gate_proj = Linear(d, f, **options, axes=("embed", "ffn"))
        self.up_proj = Linear(d, f, **options, axes=("embed", "ffn"))
        self.down_proj = Linear(f, d, **options, axes=("ffn", "embed"))

    def __call__(self, x: Array) -> Array:
        """Transform tokens [b, t, d] independently."""
        copies = copy_to_heads(x, self.down_proj.kernel.shape[0])
        gate, up = apply_to(self.gate_proj, copies), apply_to(self.up_proj, copies)
        return self.down_proj(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """`x + mixer(norm(x))`, then `x + ffn(norm(x))`.

    Args:
        config: the model's configuration.
        layer: configuration of the block's mixer.
        rngs: random streams; parameters use `params`.
        dtype: compute dtype of matrix products.
        param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: LayerConfig,
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

    def __call__(
        self, x: Array, mask: Array | None = None, *, split: TokenSplit | None = None
    ) -> Array:
        """Mix and transform tokens [b, t, d]; `mask` is bool [b, t], `split` as in the mixer."""
        options = {} if split is None else {"split": split}  # wrapped mixers need not know it
        return self._transform(x + self.mixer(self.mixer_norm(x), mask, **options))

    def extend(
        self, x: Array, cache: AnyCache, mask: Array | None = None, count: Array | None = None
    ) -> tuple[Array, AnyCache]:
        """Process the next tokens [b, t, d] of a stream; rows are padded after `count` [b]."""
        y, cache = self.mixer._extend(self.mixer_norm(x), cache, mask, count)
        return self._transform(x + y), cache

    def inspect(self, x: Array, mask: Array | None = None) -> tuple[Array, Trace | None]:
        """Process a whole sequence [b, t, d], and return the trace of the memory, if any."""
        y, trace = self.mixer._inspect(self.mixer_norm(x), mask)
        return self._transform(x + y), trace

    def _transform(self, x: Array) -> Array:
        x = constrain(x, "batch", FREE, None)
        if hasattr(self, "ffn"):
            x = constrain(x + self.ffn(self.ffn_norm(x)), "batch", FREE, None)
        return x


class LanguageModel(nnx.Module, Pretrained):
    """Language model: token ids to next-token logits.

    Args:
        config: the model's configuration.
        rngs: random streams; parameters use `params`.
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
            embedding_metadata=axes_metadata((config.vocab_size, d), None, "embed"),
        )
        self.blocks = nnx.List(
            [
                Block(config, layer, rngs=rngs, dtype=self.dtype, param_dtype=param_dtype)
                for layer in config.block_layers
            ]
        )
        self.norm = RMSNorm(d, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.head = Head(
                d, config.vocab_size, rngs=rngs, param_dtype=param_dtype, axes=("embed", None)
            )

    @with_auto_axes
    def __call__(
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
        embedding = self._embedding()
        x, invalid = self._hidden(embedding, tokens, mask, places)
        return nan_where(invalid, self._logits(x, embedding))

    @with_auto_axes
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
            tokens: as in `__call__`.
            labels: ids [b, t or p] that the tokens, or those at `places`, predict.
            mask: as in `__call__`.
            places: as in `__call__`.
            read: bool [b, t or p], False at labels to ignore, with a loss of 0; None = read all.

        Returns:
            losses, float32 (float64 if the model computes in float64), and ids, int32, both
            [b, t or p]. A label that is read and out of range has the loss NaN.

        Raises:
            ValueError: see `__call__`. In a compiled program, losses are NaN and ids -1 where the
                logits are NaN.
        """
        embedding = self._embedding()
        x, invalid = self._hidden(embedding, tokens, mask, places)
        project = self._projection(embedding)
        scores = label_scores(project, self.norm(x), labels, self.config.vocab_size, read)
        best = scores.best if invalid is None else jnp.where(invalid, -1, scores.best)
        return LabelScores(nan_where(invalid, scores.losses), best)

    def _hidden(
        self, embedding: Array, tokens: Array, mask: Array | None, places: Array | None
    ) -> tuple[Array, Array | None]:
        """Return outputs of the last block [b, t or p, d], and the mask of logits to set to NaN."""
        ids, invalid = self._safe_ids(tokens, mask, self._check(tokens, mask))
        if places is not None:
            places, invalid = safe_places(places, invalid, ids.shape[1])
        split = paired_split(self.config, ids.shape[1])
        if split:
            ids, mask = to_paired((ids, mask), split)
        x, options = self._embed(ids, embedding), {"split": split} if split else {}
        apply = _RUN[str(self.config.remat)]

        def run(block: nnx.Module, x: Array) -> Array:
            return apply(block, x, mask, options)

        if self.config.scans_layers:
            x = scan_blocks(self.blocks, len(self.config.mixers), run, x)
        else:
            for block in self.blocks:
                x = run(block, x)
        if split:
            x = from_paired(x, split)
        if places is not None:
            x = jnp.take_along_axis(x, places[..., None], axis=1)
        return x, invalid

    @with_auto_axes
    def inspect(
        self, tokens: Array, mask: Array | None = None
    ) -> tuple[Array, tuple[Trace | None, ...]]:
        """Return logits [b, t, vocab_size] and the trace of each block; None without memory.

        Args:
            tokens: as in `__call__`.
            mask: as in `__call__`.
        """
        ids, invalid = self._safe_ids(tokens, mask, self._check(tokens, mask))
        embedding = self._embedding()
        x, traces = self._embed(ids, embedding), []
        for block in self.blocks:
            x, trace = block.inspect(x, mask)
            traces.append(trace)
        return nan_where(invalid, self._logits(x, embedding)), tuple(traces)

    def init_cache(
        self,
        batch: int,
        max_tokens: int,
        *,
        cache_dtype: Dtype = None,
        cache_device: str = "device",
    ) -> tuple[AnyCache, ...]:
        """Return empty caches of all blocks; arguments as in the layer's `init_cache`."""
        return tuple(
            block.mixer.init_cache(
                batch, max_tokens, cache_dtype=cache_dtype, cache_device=cache_device
            )
            for block in self.blocks
        )

    def grow(self, cache: tuple[AnyCache, ...], max_tokens: int) -> tuple[AnyCache, ...]:
        """Return caches with the same content and the capacity `max_tokens`."""
        blocks = zip(self.blocks, cache, strict=True)
        return tuple(block.mixer.grow(block_cache, max_tokens) for block, block_cache in blocks)

    @with_auto_axes
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
        return extend_rows(partial(self._extend, in_range=in_range), tokens, cache, mask, padding)

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
        embedding = self._embedding()
        x, new = self._embed(ids, embedding), []
        for block, block_cache in zip(self.blocks, cache, strict=True):
            x, block_cache = block.extend(x, block_cache, mask, count)
            new.append(block_cache)
        if invalid is not None:
            invalid = invalid | (cache[0].position >= INVALIDATED)[:, None]
            new = [invalidate_rows(block_cache, invalid[:, -1]) for block_cache in new]
        return nan_where(invalid, self._logits(x, embedding)), tuple(new)

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

    def _embed(self, ids: Array, embedding: Array) -> Array:
        embedding = embedding.astype(self.dtype)
        return constrain(jnp.take(embedding, ids, axis=0), "batch", FREE, None)

    def _embedding(self) -> Array:
        """Return the table [vocab_size, d]; call it once, because devices may have to gather it."""
        return gather_width(self.embed.embedding)

    def _logits(self, x: Array, embedding: Array | None = None) -> Array:
        embedding = self._embedding() if embedding is None else embedding
        return self._projection(embedding)(self.norm(x))

    def _projection(self, embedding: Array) -> Callable[[Array], Array]:
        """Return the map of normalized tokens [b, t, d] to logits, a pytree of its parameters."""
        if self.config.tie_embeddings:
            return Partial(_project_tied, embedding)
        graphdef, state = nnx.split(self.head)
        return Partial(partial(_project, graphdef), gather_widths(state))


def _project_tied(embedding: Array, x: Array) -> Array:
    return einsum_f32("btd,sd->bts", x, embedding, dtype=x.dtype)


def _project(graphdef: nnx.GraphDef, state: nnx.State, x: Array) -> Array:
    return nnx.merge(graphdef, state)(x)


def _run(block: nnx.Module, x: Array, mask: Array | None, options: dict[str, Any]) -> Array:
    return block(x, mask, **options)


# By `ModelConfig.remat`: products without batch axes are those of tokens with weights.
_RUN = {
    "none": _run,
    "full": nnx.remat(_run),
    "dots": nnx.remat(_run, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
