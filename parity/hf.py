"""Folders of Hugging Face transformers as a weight format; requires the extra `hf`."""

import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mc_core.config import ModelConfig
from mc_core.errors import UserError
from mc_core.pretrained import Config, one_dtype
from mc_core.weights import Flat, leaves
from parity.carried_code import AUTO_MAP, MODELING
from parity.files import Format, ModuleWeights
from parity.weights import load_torch, torch_weights

_LOADED = count()  # of carried code: classes of two folders must not be confused

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"


def is_folder(path: Path) -> bool:
    """Return True for a folder of transformers, with a model or an adapter."""
    return any((path / name).is_file() for name in (CONFIG_FILE, ADAPTER_FILE))


def folder_tokenizer(path: Path) -> str | None:
    """Return `bytes` or the SHA-256 of the tokenizer file of a folder's model; None if unknown."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return None  # `read_folder` describes what is wrong
    tokenizer = config.get("tokenizer") if isinstance(config, dict) else None
    return tokenizer if isinstance(tokenizer, str) else None


def import_hf() -> Any:
    """Return the package `mc_torch.hf`.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        return importlib.import_module("mc_torch.hf")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise UserError(
            "transformers is not installed: pip install 'memory-caching-jax[hf]'"
        ) from error


def hf_format(
    *,
    tokenizer: str | None = None,
    padding: int | None = None,
    add_files: Callable[[Path], Any] = lambda folder: None,
) -> Format:
    """Return the format of folders that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        tokenizer: `bytes`, or the SHA-256 of the tokenizer file of a written model.
        padding: id of the padding token of a written model, if any.
        add_files: called with a written folder, to add files other than those of the model.
    """

    def write(path: Path, config: Config, flat: Flat) -> None:
        if not isinstance(config, ModelConfig):
            raise ValueError(f"{path}: only language models can be exported, not single layers")
        write_folder(path, config, flat, tokenizer, padding)
        add_files(path)

    return Format("hf", "torch", read_folder, write, outputs)


def write_folder(
    path: Path,
    config: ModelConfig,
    flat: Flat,
    tokenizer: str | None = None,
    padding: int | None = None,
) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`.

    Args:
        path: folder to write.
        config: configuration of the model.
        flat: parameters in the layout of PyTorch.
        tokenizer: `bytes`, or the SHA-256 of a tokenizer file; None = unknown.
        padding: id of the padding token, if any.
    """
    hf = import_hf()
    dtype = getattr(torch, one_dtype(leaves(flat)))
    model = hf.MemoryCachingForCausalLM(
        hf.MemoryCachingConfig.from_model_config(config, tokenizer=tokenizer)
    ).to(dtype)
    load_torch(model.model, flat)
    model.generation_config.pad_token_id = padding
    with _quiet():
        model.save_pretrained(path)


def read_folder(path: Path) -> ModuleWeights:
    """Read a folder of `write_folder`, or one that transformers saved after training."""
    model = load(path)
    # Carried code has its own class of configurations.
    config = ModelConfig.from_dict(model.config.to_model_config().to_dict())
    return ModuleWeights(config, torch_weights(model.model), "torch")


def outputs(path: Path, config: Config, inputs: np.ndarray) -> np.ndarray:
    """Return the logits [b, t, vocab_size] in float64 of a folder's model for ids [b, t].

    A folder with code is loaded with that code.

    Args:
        path: folder of transformers.
        config: configuration used in place of that of the folder; same parameters.
        inputs: ids.
    """
    assert isinstance(config, ModelConfig)
    model = load(path, config, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.from_numpy(inputs)).logits.numpy()


def load(path: Path, config: ModelConfig | None = None, dtype: torch.dtype | str = "auto") -> Any:
    """Return the model of a folder, on the CPU.

    Args:
        path: folder of transformers. If it has code, that code is used.
        config: configuration used in place of that of the folder.
        dtype: dtype of the parameters; `auto` = that of the folder.

    Raises:
        ValueError: the folder is damaged or has another model.
    """
    if (path / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{path}: has an adapter only: merge it into its model first, with "
            "model.merge_and_unload().save_pretrained(FOLDER)"
        )
    config_class, model_class = _classes(path)
    options = {} if config is None else {"config": config_class.from_model_config(config)}
    try:
        with _quiet():
            if config is None:
                options["config"] = _read_config(path, config_class)
            model, info = model_class.from_pretrained(
                path, **options, dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of transformers, safetensors, torch and json
        raise ValueError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    wrong = [
        f"{kind.removesuffix('_keys')} {key}" for kind in sorted(info) for key in _names(info[kind])
    ]
    if wrong:
        raise ValueError(f"{path}: weights do not match: {', '.join(wrong)}")
    return model.eval()


def _classes(path: Path) -> tuple[Any, Any]:
    """Return the classes of configuration and model: those in the folder, if it has code."""
    hf = import_hf()
    if not (path / f"{MODELING}.py").is_file():
        return hf.MemoryCachingConfig, hf.MemoryCachingForCausalLM
    package = types.ModuleType(f"carried_code_{next(_LOADED)}")
    package.__path__ = [str(path)]
    sys.modules[package.__name__] = package
    parts = (AUTO_MAP[name].split(".") for name in ("AutoConfig", "AutoModelForCausalLM"))
    config_class, model_class = (
        getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
        for module, name in parts
    )
    return config_class, model_class


def _read_config(path: Path, config_class: Any) -> Any:
    found = json.loads((path / CONFIG_FILE).read_text()).get("model_type")
    if found != config_class.model_type:
        raise ValueError(f"model_type = {found!r}: must be {config_class.model_type!r}")
    return config_class.from_pretrained(path, local_files_only=True)


def _names(keys: Any) -> list[str]:
    """Return the names of parameters in a list of keys, or of tuples that begin with keys."""
    if isinstance(keys, str):
        return [keys]
    return sorted(key if isinstance(key, str) else str(key[0]) for key in keys)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
