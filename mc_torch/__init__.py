"""Memory Caching in PyTorch: the mirror of `mc_jax`, file by file and name by name."""

from mc_torch.attention import AttentionLayer
from mc_torch.backends import (
    Coefficients,
    Events,
    MatrixMemory,
    Memory,
    MemoryState,
    register_backend,
)
from mc_torch.cache import Cache, KVCache, Segments, check_room, grow, init_cache
from mc_torch.cache_file import load_cache, save_cache
from mc_torch.functional import Result, extend, memory_caching
from mc_torch.generation import generate, sample
from mc_torch.inspection import InnerLoop, Trace
from mc_torch.layer import MemoryCachingLayer
from mc_torch.model import LanguageModel
from mc_torch.rows import take_rows

__all__ = [
    "AttentionLayer",
    "Cache",
    "Coefficients",
    "Events",
    "InnerLoop",
    "KVCache",
    "LanguageModel",
    "MatrixMemory",
    "Memory",
    "MemoryCachingLayer",
    "MemoryState",
    "Result",
    "Segments",
    "Trace",
    "check_room",
    "extend",
    "generate",
    "grow",
    "init_cache",
    "load_cache",
    "memory_caching",
    "register_backend",
    "sample",
    "save_cache",
    "take_rows",
]
