"""The configuration of a run: schema, YAML files and `key=value` overrides."""

from mc_core.serialization import to_dict
from train.config.comparison import FREE_KEYS, first_difference
from train.config.loading import load_config
from train.config.mesh import MeshConfig, parse_mesh
from train.config.recall_schema import TASKS, Length, MQARConfig, NIAHConfig
from train.config.schema import (
    DataConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    WeightedCorpus,
    from_dict,
)

__all__ = [
    "FREE_KEYS",
    "TASKS",
    "DataConfig",
    "Length",
    "MQARConfig",
    "MeshConfig",
    "NIAHConfig",
    "RunConfig",
    "TextConfig",
    "TrainConfig",
    "WeightedCorpus",
    "first_difference",
    "from_dict",
    "load_config",
    "parse_mesh",
    "to_dict",
]
