"""The memory kinds, one file each; importing this package registers them."""

from mc_jax.backends.base import (
    ChunkDecay,
    Coefficients,
    MatrixMemory,
    Memory,
    MemoryState,
    Norm,
    RankOneUpdates,
    Tokens,
    Weights,
    make_memory,
    register_backend,
)
from mc_jax.backends.delta import DeltaMemory
from mc_jax.backends.dla import DLA
from mc_jax.backends.linear import LinearMemory
from mc_jax.backends.swla import SWLA
from mc_jax.backends.titans import Titans

__all__ = [
    "DLA",
    "SWLA",
    "ChunkDecay",
    "Coefficients",
    "DeltaMemory",
    "LinearMemory",
    "MatrixMemory",
    "Memory",
    "MemoryState",
    "Norm",
    "RankOneUpdates",
    "Titans",
    "Tokens",
    "Weights",
    "make_memory",
    "register_backend",
]
