"""The four memories, one file a kind."""

from mc_core.config import DLAConfig, LinearConfig, MemoryConfig, SWLAConfig
from mc_jax.backends.base import (
    ChunkMix,
    Coefficients,
    Events,
    Memory,
    MemoryState,
    Tokens,
    Weights,
)
from mc_jax.backends.dla import DLA
from mc_jax.backends.linear import Linear
from mc_jax.backends.mlp import Norm
from mc_jax.backends.swla import SWLA
from mc_jax.backends.titans import Titans

__all__ = [
    "DLA",
    "SWLA",
    "ChunkMix",
    "Coefficients",
    "Events",
    "Linear",
    "Memory",
    "MemoryState",
    "Norm",
    "Titans",
    "Tokens",
    "Weights",
    "make_memory",
]


def make_memory(config: MemoryConfig, norm: Norm = None) -> Memory:
    """Return the memory of a configuration; `norm` is (gain, bias), each [h, v]."""
    if isinstance(config, LinearConfig):
        return Linear(config)
    if isinstance(config, SWLAConfig):
        return SWLA(config)
    return DLA(config, norm) if isinstance(config, DLAConfig) else Titans(config, norm)
