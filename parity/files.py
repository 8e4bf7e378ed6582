"""Weight files: safetensors, and PyTorch `state_dict` files with a configuration."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mc_core.prefixes import find_state_dict, strip_prefixes
from mc_core.pretrained import Config, describe, read_description, to_metadata
from mc_core.weights import Flat, to_jax, to_torch
from mc_jax.pretrained import read_file
from parity.weights import to_numpy, to_tensor

TRAINING_KEY = "training"  # of a training loop's state in a checkpoint with a configuration


class ModuleWeights(NamedTuple):
    """The parameters of a module, in the layout of one framework."""

    config: Config | None  # None: not in the file
    flat: Flat
    framework: str  # "jax" or "torch"

    def in_layout(self, framework: str) -> Flat:
        """Return the parameters in the layout of a framework.

        Raises:
            ValueError: parameters are not in the weight table; lists all of them.
        """
        if framework == self.framework:
            return self.flat
        return to_torch(self.flat) if framework == "torch" else to_jax(self.flat)


class Format(NamedTuple):
    """A weight file format; `read` and `write` raise ValueError or OSError with the path."""

    name: str
    framework: str  # layout of the weights, "jax" or "torch"
    read: Callable[[Path], ModuleWeights]
    write: Callable[[Path, Config, Flat], None]  # expects weights in `layout`
    # Outputs of a written module, in float64, by the loader that its users call; None: the outputs
    # of `mc_jax` or `mc_torch` with the weights that `read` returns.
    outputs: Callable[[Path, Config, np.ndarray], np.ndarray] | None = None


def read_safetensors(path: Path) -> ModuleWeights:
    """Read a file of `write_safetensors`."""
    config, flat = read_file(path, Config)
    return ModuleWeights(config, flat, "torch")


def write_safetensors(path: Path, config: Config, flat: Flat, tokenizer: str | None = None) -> None:
    """Write tensors, with the configuration and any tokenizer hash in the metadata."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(flat, path, metadata=to_metadata(config, tokenizer))
    path.chmod(mode)  # the library creates files that only the owner can read
    _sync(path)


def read_state_dict(path: Path) -> ModuleWeights:
    """Read a file of `write_state_dict`, or a `state_dict` without configuration.

    The former may have an entry `training` with the state of a training loop, which is ignored. The
    latter may also be an entry of a checkpoint. Prefixes that wrappers add to names are removed,
    and a message is logged.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        config = None
        if isinstance(loaded, dict) and _is_described(loaded):
            others = ("state_dict", TRAINING_KEY)
            description = {key: value for key, value in loaded.items() if key not in others}
            config, loaded = read_description(description, Config), loaded["state_dict"]
        tensors = strip_prefixes(find_state_dict(loaded, path, torch.is_tensor), path)
    except OSError:
        raise
    except Exception as error:  # torch.load raises various exceptions
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    return ModuleWeights(
        config, {name: to_numpy(tensor) for name, tensor in tensors.items()}, "torch"
    )


def write_state_dict(path: Path, config: Config, flat: Flat) -> None:
    """Write `{"version", "module", "config", "state_dict"}`; it loads with `weights_only=True`."""
    tensors = {name: to_tensor(array) for name, array in flat.items()}
    torch.save({**describe(config), "state_dict": tensors}, path)
    _sync(path)


SAFETENSORS = Format("safetensors", "torch", read_safetensors, write_safetensors)
STATE_DICT = Format("torch", "torch", read_state_dict, write_state_dict)


def _is_described(loaded: dict[str, Any]) -> bool:
    """Return True for files of `write_state_dict`, including other versions and damaged ones."""
    others = loaded.keys() - {"state_dict", TRAINING_KEY}
    alone = bool(others) and others <= {"version", "module", "config"}
    return "state_dict" in loaded and ("version" in loaded or alone)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
