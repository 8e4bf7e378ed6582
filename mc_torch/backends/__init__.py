"""The memory kinds, one file each; importing this package registers them."""

from mc_torch.backends.base import (
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
from mc_torch.backends.delta import DeltaMemory
from mc_torch.backends.dla import DLA
from mc_torch.backends.linear import LinearMemory
from mc_torch.backends.swla import SWLA
from mc_torch.backends.titans import Titans

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
