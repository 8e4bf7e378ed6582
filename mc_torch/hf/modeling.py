"""Causal language model for Hugging Face transformers."""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from mc_torch.cache_rows import invalidate_rows
from mc_torch.chunk_layout import Packing, first_tokens, make_packing, pack, unpack
from mc_torch.hf.cache import StreamCache
from mc_torch.hf.configuration import MemoryCachingConfig
from mc_torch.ids import nan_where
from mc_torch.model import LanguageModel
from mc_torch.modules import call_hooked
from mc_torch.numerics import Array, compute_dtype, remat

# The name of the cache in calls and outputs, which newer versions of transformers changed.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class MemoryCachingForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of Hugging Face transformers.

    Its parameters are those of `LanguageModel`, with the prefix `model.`.

    Args:
        config: the model's configuration.
    """

    config: MemoryCachingConfig
    config_class = MemoryCachingConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _is_stateful = True  # a state cannot be cropped, as assisted generation requires

    def __init__(self, config: MemoryCachingConfig):
        super().__init__(config)
        self.model = LanguageModel(config.to_model_config())
        self.gradient_checkpointing = False
        for parameter in self.model.parameters():
            # Parameters on the meta device are loaded or drawn later.
            parameter._is_hf_initialized = not parameter.is_meta
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        past_key_values: StreamCache | None = None,
        inputs_embeds: Array | None = None,
        labels: Array | None = None,
        *,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Array = 0,
        cache: StreamCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits, and the loss if there are labels.

        Without a cache, whole sequences are processed in parallel. With a cache, or with
        `use_cache`, tokens extend the streams of the cache.

        Args:
            input_ids: ids [b, t].
            attention_mask: [b, s], s >= t, 0 at padding anywhere; the last t columns are those of
                `input_ids`. Results do not depend on padding.
            past_key_values: state of the streams before these tokens; it is updated.
            inputs_embeds: embeddings [b, t, d] in place of `input_ids`.
            labels: ids [b, t], -100 at ignored tokens. The logits of a token predict the label of
                the next one.
            use_cache: return a cache also without `past_key_values`. Default: only with one.
            output_hidden_states: return the input of the first block and the output of each block,
                each [b, t, d]; the final norm is applied to the last one.
            logits_to_keep: number of last tokens to compute logits for, 0 = all; or integers [p],
                indices of tokens.
            cache: newer name of `past_key_values`.
            kwargs: `num_items_in_batch`, the divisor of the summed loss, and other arguments of the
                loss. `position_ids` are checked, not used: positions count tokens without padding.

        Returns:
            loss, float32 []; logits [b, t or p, vocab_size], float32; the cache; hidden states.

        Raises:
            ValueError: an argument has a wrong type or shape, an id is out of range, or positions
                restart within a row.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, StreamCache):
            raise ValueError(f"{CACHE} is a {type(cache).__name__}: must be a StreamCache")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("input_ids and inputs_embeds: exactly one must be given")
        padding = _padding(attention_mask, tokens)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None and use_cache:
            cache = StreamCache()
        _check_positions(kwargs.pop("position_ids", None), padding)

        x, invalid = self._embed(input_ids, inputs_embeds, padding, cache)
        packing = None if padding is None else make_packing(padding)
        x = x if packing is None else pack(x, packing)
        hidden: list[Array] = []
        if cache is None:
            x = self._run(x, packing, hidden if output_hidden_states else None)
        else:
            x = self._extend(x, packing, cache, invalid, hidden if output_hidden_states else None)
        if packing is not None:
            x, hidden = unpack(x, packing), [unpack(y, packing) for y in hidden]
        keep: Any = logits_to_keep
        keep = slice(-keep, None) if isinstance(keep, int) else keep
        kept = None if invalid is None else invalid[:, keep]
        logits = nan_where(kept, self.model._logits(x[:, keep]))
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        fields: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: cache}
        if output_hidden_states:
            fields["hidden_states"] = (*hidden, self.model.norm(x))
        return CausalLMOutputWithPast(**fields)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None if its weights are those of the embedding."""
        return getattr(self.model, "head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Change the size of the vocabulary; see `PreTrainedModel.resize_token_embeddings`.

        Args:
            new_num_tokens: number of ids; None = no change.
            pad_to_multiple_of: round the number up to a multiple.
            mean_resizing: draw new embeddings with the mean and covariance of the old ones.
        """
        embeddings = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        self.model.config = self.config.to_model_config()
        embeddings._is_hf_initialized = True  # type: ignore[assignment]
        return embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the parameters that a checkpoint lacks, as the constructor does."""
        missing = {
            f"{path}.{name}": parameter
            for path, module in self.model.named_modules()
            if not _is_initialized(module)
            for name, parameter in module.named_parameters(recurse=False)
            if not _is_initialized(parameter)
        }
        if missing:
            drawn = dict(LanguageModel(self.model.config).named_parameters())
            for name, parameter in missing.items():
                parameter.copy_(drawn[name])

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because `initialize_weights` draws all parameters."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Add an empty cache to the arguments of the first call, unless there is one."""
        name = generation_config.cache_implementation
        if name is not None:
            raise ValueError(f"cache_implementation = {name!r}: must be None, for a StreamCache")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = StreamCache()

    def _embed(
        self,
        input_ids: Array | None,
        inputs_embeds: Array | None,
        padding: Array | None,
        cache: StreamCache | None,
    ) -> tuple[Array, Array | None]:
        """Return embeddings [b, t, d], and bool [b, t], True at logits to set to NaN, or None."""
        if input_ids is None:
            assert inputs_embeds is not None
            return inputs_embeds.to(compute_dtype(inputs_embeds)), None
        # Checking the ids of single steps would synchronize with the device.
        checks_values = cache is None or input_ids.shape[1] > 1
        in_range = self.model._check(input_ids, None, padding, checks_values)
        ids, invalid = self.model._safe_ids(
            input_ids, None if padding is None else ~padding, in_range
        )
        return self.model._embed(ids), invalid

    def _run(self, x: Array, packing: Packing | None, hidden: list[Array] | None) -> Array:
        """Process whole sequences [b, t, d]; append the input of each block to `hidden`."""
        mask = None if packing is None else first_tokens(packing.tokens, x.shape[1])
        for block in self.model.blocks:
            if hidden is not None:
                hidden.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, mask)
            else:
                x = remat(block, str(self.model.config.remat))(x, mask)
        return x

    def _extend(
        self,
        x: Array,
        packing: Packing | None,
        cache: StreamCache,
        invalid: Array | None,
        hidden: list[Array] | None,
    ) -> Array:
        """Process the next tokens [b, t, d] of streams, right-padded, and update their cache."""
        states = cache.reserve(self.model, *x.shape[:2])
        count = None if packing is None else packing.tokens
        new: list[Any] = []
        blocks: Any = zip(self.model.blocks, states, strict=True)
        for block, state in blocks:
            if hidden is not None:
                hidden.append(x)
            x, state = call_hooked(block, block.extend, x, state, None, count)
            new.append(state)
        if invalid is not None:
            new = [invalidate_rows(state, invalid[:, -1]) for state in new]
        cache.advance(tuple(new), x.shape[1])
        return x


def _is_initialized(part: nn.Module | Array) -> bool:
    """Return True if transformers, or the constructor, has marked a module or parameter."""
    return getattr(part, "_is_hf_initialized", False)


def _padding(attention_mask: Array | None, tokens: Array) -> Array | None:
    """Return bool [b, t], True at padding; None = no padding."""
    if attention_mask is None:
        return None
    b, t = tokens.shape[:2]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != b or shape[1] < t:
        raise ValueError(f"attention_mask has shape {shape}: must be [{b}, s] with s >= {t}")
    padding = attention_mask[:, -t:] == 0
    return padding if torch.compiler.is_compiling() or padding.any() else None


def _check_positions(position_ids: Array | None, padding: Array | None) -> None:
    """Check that positions count the tokens of each row, as those of packed documents do not."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    restarts = position_ids[..., 1:] - position_ids[..., :-1] != 1
    if padding is not None and padding.shape == position_ids.shape:
        restarts = restarts & ~padding[:, 1:] & ~padding[:, :-1]
    if restarts.any():
        raise ValueError(
            "position_ids: must count up by 1 in each row; packed documents are not supported, so "
            "use one document per row and attention_mask"
        )
