"""Memory Caching in PyTorch: the mirror of `mc_jax`, file by file and name by name."""

from mc_torch.attention import AttentionLayer
from mc_torch.backends import (
    Coefficients,
    MatrixMemory,
    Memory,
    MemoryState,
    RankOneUpdates,
    register_backend,
)
from mc_torch.cache import Cache, KVCache, Segments, check_capacity, grow, init_cache
from mc_torch.cache_file import load_cache, save_cache
from mc_torch.cache_rows import take_rows
from mc_torch.functional import Result, extend, memory_caching
from mc_torch.generation import generate, prefill, sample
from mc_torch.inspection import InnerLoop, Trace
from mc_torch.layer import MemoryCachingLayer
from mc_torch.level_cache import LevelCache
from mc_torch.log_linear import log_linear_attention
from mc_torch.log_linear_layer import LogLinearAttentionLayer
from mc_torch.model import LanguageModel

__all__ = [
    "AttentionLayer",
    "Cache",
    "Coefficients",
    "InnerLoop",
    "KVCache",
    "LanguageModel",
    "LevelCache",
    "LogLinearAttentionLayer",
    "MatrixMemory",
    "Memory",
    "MemoryCachingLayer",
    "MemoryState",
    "RankOneUpdates",
    "Result",
    "Segments",
    "Trace",
    "check_capacity",
    "extend",
    "generate",
    "grow",
    "init_cache",
    "load_cache",
    "log_linear_attention",
    "memory_caching",
    "prefill",
    "register_backend",
    "sample",
    "save_cache",
    "take_rows",
]
