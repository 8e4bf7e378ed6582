"""What both frameworks share: configurations and the plan of segments and chunks. NumPy only."""

from mc_core.config import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    MCConfig,
    MemoryConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.segmentation import Plan, make_plan, segment_lengths

__all__ = [
    "AttentionConfig",
    "DLAConfig",
    "LinearConfig",
    "MCConfig",
    "MemoryConfig",
    "ModelConfig",
    "Plan",
    "SWLAConfig",
    "TitansConfig",
    "make_plan",
    "segment_lengths",
]
