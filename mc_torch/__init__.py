"""Memory Caching in PyTorch: the mirror of `mc_jax`, file by file and name by name."""

from mc_torch.backends import Coefficients, MemoryState
from mc_torch.cache import Cache, Segments, grow, init_cache
from mc_torch.functional import Result, extend, memory_caching
from mc_torch.generation import generate, sample
from mc_torch.layer import MemoryCachingLayer, Trace
from mc_torch.model import LanguageModel

__all__ = [
    "Cache",
    "Coefficients",
    "LanguageModel",
    "MemoryCachingLayer",
    "MemoryState",
    "Result",
    "Segments",
    "Trace",
    "extend",
    "generate",
    "grow",
    "init_cache",
    "memory_caching",
    "sample",
]
