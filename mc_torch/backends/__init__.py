"""The memory kinds, one file each; importing this package registers them."""

from mc_torch.backends.base import (
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
from mc_torch.backends.dla import DLA
from mc_torch.backends.linear import Linear
from mc_torch.backends.swla import SWLA
from mc_torch.backends.titans import Titans

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
