"""A user's model as a case, from the YAML file of a run or from a checkpoint."""

from pathlib import Path

import numpy as np

from mc_core import MCConfig, ModelConfig
from mc_core.errors import UserError
from mc_core.pretrained import Config
from parity.cases import Case, rounded, state_dtype
from parity.files import SAFETENSORS, STATE_DICT, ModuleWeights
from parity.weights import Flat
from train.config import load_config
from train.convert import read_run

READERS = {".safetensors": SAFETENSORS.read, ".pt": STATE_DICT.read, ".pth": STATE_DICT.read}


def own_case(
    config: Path | None, checkpoint: Path | None, dtype: str, tokens: int | None
) -> tuple[Case, Flat | None]:
    """Return the case of a user's model, and its weights if a checkpoint is given.

    Args:
        config: YAML file of a run.
        checkpoint: run directory, or weight file of `mc convert`.
        dtype: compute dtype.
        tokens: sequence length; None = two segments and a part of a third.

    Raises:
        UserError: a file cannot be used, or both are given and their models differ.
    """
    loaded = None if checkpoint is None else _read(checkpoint)
    model: Config | None = None if config is None else load_config(config).model
    if loaded is not None and loaded.config is not None:
        if model not in (None, loaded.config):
            raise UserError(f"{checkpoint} has another model than {config}")
        model = loaded.config
    if model is None:
        raise UserError(f"{checkpoint} has no configuration: give --config")
    if not isinstance(model, MCConfig | ModelConfig):
        raise UserError(
            f"{checkpoint} contains a layer without memory: must be a model or a memory"
        )
    level = "model" if isinstance(model, ModelConfig) else "layer"
    layer = model.layer if isinstance(model, ModelConfig) else model
    tokens = tokens or 2 * layer.segment_size + 5
    case = Case(model, level, tokens=tokens, dtype=dtype, drawn=False)
    if loaded is None:
        return case, None
    flat = {name: x.astype(np.float64) for name, x in loaded.in_layout("jax").items()}
    return case, rounded(flat, state_dtype(dtype))


def _read(path: Path) -> ModuleWeights:
    if path.is_dir():
        return read_run(path)
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise UserError(f"{path}: must be a run directory, or a file that ends in one of {known}")
    return READERS[path.suffix](path)
