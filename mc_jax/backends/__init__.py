"""The memory kinds, one file each; importing this package registers them."""

from mc_jax.backends.base import (
    ChunkMix,
    Coefficients,
    Events,
    MatrixMemory,
    Memory,
    MemoryState,
    Norm,
    Tokens,
    Weights,
    make_memory,
    register_backend,
)
from mc_jax.backends.dla import DLA
from mc_jax.backends.linear import Linear
from mc_jax.backends.swla import SWLA
from mc_jax.backends.titans import Titans

__all__ = [
    "DLA",
    "SWLA",
    "ChunkMix",
    "Coefficients",
    "Events",
    "Linear",
    "MatrixMemory",
    "Memory",
    "MemoryState",
    "Norm",
    "Titans",
    "Tokens",
    "Weights",
    "make_memory",
    "register_backend",
]
