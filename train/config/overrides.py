"""`key=value` overrides of the configuration of a trained run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mc_core.config import ModelConfig
from mc_core.errors import UserError
from mc_core.serialization import from_dict as build
from mc_core.serialization import to_dict
from train.config.loading import apply_overrides
from train.config.schema import TrainConfig, from_dict
from train.config.yaml_files import to_plain

WORD = re.compile(r"(model|data|optimizer|run)(\.\w+)+=")
# Sections and keys that may differ from training without changing the trained parameters or text.
MODEL = "model."
OTHERS = ("data.window", "run.batch_size", "run.dtype")


def split_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Separate paths from `key=value` overrides; an existing path is never an override."""
    overrides = [word for word in words if WORD.match(word) and not Path(word).exists()]
    return [Path(word) for word in words if word not in overrides], overrides


def override(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """Return the configuration of a trained run with overrides, in the syntax of `mc train`.

    Args:
        config: configuration of the run.
        words: `key=value` for keys of the model, `data.window`, `run.batch_size` or `run.dtype`.

    Raises:
        UserError: a key or value is not allowed.
    """
    for word in words:
        key = word.partition("=")[0]
        if not key.startswith(MODEL) and key not in OTHERS:
            raise UserError(
                f"{word}: only keys of {MODEL[:-1]} and {', '.join(OTHERS)} can differ from those "
                "of a trained run"
            )
    return _rebuild(to_dict(config), words, from_dict)


def override_model(config: ModelConfig, words: Sequence[str]) -> ModelConfig:
    """Return the configuration of a model with overrides `model.key=value`.

    Raises:
        UserError: a key or value is not allowed.
    """
    for word in words:
        if not word.startswith(MODEL):
            raise UserError(f"{word}: must begin with {MODEL} for a file of weights")

    def rebuild(data: Any) -> ModelConfig:
        return build(ModelConfig, data["model"], "model")

    return _rebuild({"model": config.to_dict()}, words, rebuild)


def _rebuild(data: dict[str, Any], words: Sequence[str], build: Any) -> Any:
    merged = apply_overrides(OmegaConf.create(data), words)
    try:
        return build(to_plain(merged, Path("overrides")))
    except ValueError as error:
        raise UserError(str(error)) from error
