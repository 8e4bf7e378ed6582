"""Small models of Hugging Face transformers."""

import torch

from mc_core import LinearConfig, MCConfig, ModelConfig, TitansConfig
from mc_torch.hf import MemoryCachingConfig, MemoryCachingForCausalLM

VOCABULARY = 37
LAYERS = {
    "titans": MCConfig(8, 2, TitansConfig(expansion=1), "grm", segment_size=4, chunk_size=4),
    "linear-ssc-conv": MCConfig(
        8, 2, LinearConfig(), "ssc", segment_size=3, chunk_size=3, conv_width=3
    ),
    "linear-fenwick": MCConfig(
        8, 2, LinearConfig(), "grm", segmentation="fenwick", segment_size=2, chunk_size=2
    ),
}
MIXERS = {"linear-fenwick": ("log_linear", "memory"), "linear-ssc-conv": ("memory", "window")}


def hf_model(name: str = "linear-ssc-conv", **fields: object) -> MemoryCachingForCausalLM:
    """Return a model of two blocks with weights drawn from a fixed seed."""
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, "num_layers": 2, "layer": LAYERS[name], "ffn_width": 8}
    options |= {"attention_window": 5, "mixers": MIXERS.get(name, ("memory",))}
    config = ModelConfig(**options | fields)
    return MemoryCachingForCausalLM(MemoryCachingConfig.from_model_config(config)).eval()


def draw_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return random ids."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ids and attention mask of prompts [t] of different lengths."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}
