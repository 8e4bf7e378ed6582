"""Configuration of a language model for Hugging Face transformers."""

import dataclasses
from typing import Any, ClassVar, Self

from transformers import PretrainedConfig

from mc_core.config import MCConfig, ModelConfig

DEFAULT = ModelConfig(vocab_size=256, num_layers=2, layer=MCConfig(d_model=128, num_heads=4))


class MemoryCachingConfig(PretrainedConfig):
    """Configuration of a `MemoryCachingForCausalLM`: the fields of `ModelConfig` as plain values.

    Args:
        tokenizer: `bytes`, or the SHA-256 of the `tokenizer.json` that the model was trained with;
            None = unknown.
        fields: fields of `ModelConfig`, `layer` as a dictionary or an `MCConfig`; and those of
            `PretrainedConfig`. Missing fields describe a small model of bytes.

    Raises:
        ValueError: a field is invalid; the message states its value and the allowed values.
    """

    model_type = "memory_caching"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, tokenizer: str | None = None, **fields: Any):
        for alias, name in self.attribute_map.items():
            if alias in fields:
                fields[name] = fields.pop(alias)
        values = DEFAULT.to_dict()
        given = {name: fields.pop(name) for name in tuple(fields) if name in values}
        if isinstance(given.get("layer"), MCConfig):
            given["layer"] = given["layer"].to_dict()
        model = ModelConfig.from_dict(values | given)
        for name, value in model.to_dict().items():
            setattr(self, name, value)
        self.tokenizer = tokenizer
        super().__init__(**fields)
        # The defaults of other versions of the base class must not replace the model's.
        self.tie_embeddings = model.tie_embeddings

    @classmethod
    def from_model_config(cls, config: ModelConfig, **fields: Any) -> Self:
        """Return the configuration of a model; `fields` are other arguments of the constructor."""
        return cls(**config.to_dict(), **fields)

    def to_model_config(self) -> ModelConfig:
        """Return the configuration as a `ModelConfig`.

        Raises:
            ValueError: an attribute was set to an invalid value.
        """
        names = [field.name for field in dataclasses.fields(ModelConfig)]
        return ModelConfig.from_dict({name: getattr(self, name) for name in names})

    @property
    def hidden_size(self) -> int:
        """Model width d."""
        return self.layer["d_model"]

    @property
    def num_attention_heads(self) -> int:
        """Number of heads of each mixer."""
        return self.layer["num_heads"]
