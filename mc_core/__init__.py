"""Shared by both frameworks: configurations and plans of segments and chunks. NumPy only."""

from mc_core.attention import AttentionConfig
from mc_core.config import MCConfig, ModelConfig
from mc_core.log_linear import LogLinearConfig
from mc_core.memories import MemoryConfig, register_memory
from mc_core.memory_kinds import (
    DeltaConfig,
    DLAConfig,
    LinearConfig,
    MLPConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.segmentation import Plan, make_plan, segment_lengths

__all__ = [
    "AttentionConfig",
    "DLAConfig",
    "DeltaConfig",
    "LinearConfig",
    "LogLinearConfig",
    "MCConfig",
    "MLPConfig",
    "MemoryConfig",
    "ModelConfig",
    "Plan",
    "SWLAConfig",
    "TitansConfig",
    "make_plan",
    "register_memory",
    "segment_lengths",
]
