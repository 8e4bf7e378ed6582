"""Memory Caching in JAX: functional recurrences under thin Flax NNX modules."""

from mc_jax.attention import AttentionLayer
from mc_jax.backends import (
    Coefficients,
    MatrixMemory,
    Memory,
    MemoryState,
    RankOneUpdates,
    register_backend,
)
from mc_jax.cache import Cache, KVCache, Segments, check_capacity, grow, init_cache
from mc_jax.cache_file import load_cache, save_cache
from mc_jax.cache_rows import take_rows
from mc_jax.functional import Result, extend, memory_caching
from mc_jax.generation import generate, prefill, sample
from mc_jax.inspection import InnerLoop, Trace
from mc_jax.layer import MemoryCachingLayer
from mc_jax.level_cache import LevelCache
from mc_jax.log_linear import log_linear_attention
from mc_jax.log_linear_layer import LogLinearAttentionLayer
from mc_jax.model import LanguageModel

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
