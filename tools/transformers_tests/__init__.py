"""The common tests of models in Hugging Face transformers, run on `MemoryCachingForCausalLM`."""
