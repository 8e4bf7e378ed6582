"""`ModelTesterMixin` of transformers for our model; run by `tools.transformers_tests`."""

import copy
import unittest
from typing import Any

import torch
from tests.test_modeling_common import ModelTesterMixin, ids_tensor

from mc_core import MCConfig, TitansConfig
from mc_torch.hf import MemoryCachingConfig, MemoryCachingForCausalLM

VOCABULARY = 99
# Reasons of tests that do not apply, in addition to those that the tests find themselves.
BLOCKS = "activation checkpointing is a flag of the model, not of its blocks"
GENERATION = "the source distribution lacks GenerationTesterMixin"


class ModelInputs:
    """Sizes, configuration and inputs of the tests."""

    batch_size, seq_length, hidden_size = 2, 13, 16
    num_hidden_layers, num_attention_heads, vocab_size = 2, 2, VOCABULARY
    is_training = True

    def get_config(self) -> MemoryCachingConfig:
        """Return the configuration of a small model."""
        layer = MCConfig(16, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=2)
        return MemoryCachingConfig(
            vocab_size=VOCABULARY, num_layers=2, ffn_width=16, tie_embeddings=False, layer=layer
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[MemoryCachingConfig, dict[str, Any]]:
        """Return a configuration and the arguments of a call."""
        ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class CommonTest(ModelTesterMixin, unittest.TestCase):
    """The tests that all models of transformers share."""

    all_model_classes = (MemoryCachingForCausalLM,)
    has_attentions = False

    def setUp(self) -> None:
        """Set the model under test."""
        self.model_tester = ModelInputs()

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        """Add labels, which the base class does only for models of transformers."""
        inputs = copy.deepcopy(inputs_dict)
        return inputs | ({"labels": inputs["input_ids"]} if return_labels else {})

    def test_generation_tester_mixin_inheritance(self) -> None:
        """Not run."""
        self.skipTest(GENERATION)

    def test_gradient_checkpointing_enable_disable(self) -> None:
        """Not run."""
        self.skipTest(BLOCKS)

    def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Not run."""
        self.skipTest(BLOCKS)
