"""Hugging Face transformers: importing this package registers the model with the Auto classes.

    import mc_torch.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)  # a folder of `mc export`
    tokenizer = AutoTokenizer.from_pretrained(folder)

Requires the extra `hf`. `mc_torch` itself does not import transformers.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mc_torch.hf.cache import StreamCache
from mc_torch.hf.configuration import MemoryCachingConfig
from mc_torch.hf.modeling import MemoryCachingForCausalLM

__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "StreamCache"]

AutoConfig.register(MemoryCachingConfig.model_type, MemoryCachingConfig)
AutoModelForCausalLM.register(MemoryCachingConfig, MemoryCachingForCausalLM)
