"""Files of weights: safetensors, and a PyTorch `state_dict` with its configuration."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mc_core.config import MCConfig, ModelConfig
from mc_core.prefixes import find_state_dict, strip_prefixes
from mc_core.pretrained import describe, read_description, to_metadata
from mc_core.weights import Flat, to_jax, to_torch
from mc_jax.pretrained import read_file
from parity.weights import to_numpy, to_tensor

Config = MCConfig | ModelConfig


class Weights(NamedTuple):
    """The parameters of a module, in the layout of one framework."""

    config: Config | None  # None: not in the file
    flat: Flat
    framework: str  # "jax" or "torch"

    def laid_out(self, framework: str) -> Flat:
        """Return the parameters in the layout of either framework.

        Raises:
            ValueError: lists every parameter that the table does not have.
        """
        if framework == self.framework:
            return self.flat
        return to_torch(self.flat) if framework == "torch" else to_jax(self.flat)


class Format(NamedTuple):
    """A file format of weights; both functions raise ValueError or OSError with the path in it."""

    name: str
    framework: str  # layout of the weights
    read: Callable[[Path], Weights]
    write: Callable[[Path, Config, Flat], None]  # takes weights in the format's layout


def read_safetensors(path: Path) -> Weights:
    """Read a file that `write_safetensors` wrote."""
    config, flat = read_file(path, Config)
    return Weights(config, flat, "torch")


def write_safetensors(path: Path, config: Config, flat: Flat, tokenizer: str | None = None) -> None:
    """Write tensors, and into the metadata the configuration and the tokenizer's hash, if any."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(flat, path, metadata=to_metadata(config, tokenizer))
    path.chmod(mode)  # the library makes it readable only for its owner
    _sync(path)


def read_state_dict(path: Path) -> Weights:
    """Read a file that `write_state_dict` wrote, or a `state_dict` that has no configuration.

    The latter may be bare, or a part of a training loop's checkpoint. Prefixes that wrappers add
    to names are removed, with a line in the log.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        config = None
        if isinstance(loaded, dict) and _is_described(loaded):
            description = {key: value for key, value in loaded.items() if key != "state_dict"}
            config, loaded = read_description(description, Config), loaded["state_dict"]
        tensors = strip_prefixes(find_state_dict(loaded, path, torch.is_tensor), path)
    except OSError:
        raise
    except Exception as error:  # torch.load raises nothing narrower
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    return Weights(config, {name: to_numpy(tensor) for name, tensor in tensors.items()}, "torch")


def write_state_dict(path: Path, config: Config, flat: Flat) -> None:
    """Write `{"version", "module", "config", "state_dict"}`; `torch.load` needs no code for it."""
    tensors = {name: to_tensor(array) for name, array in flat.items()}
    torch.save({**describe(config), "state_dict": tensors}, path)
    _sync(path)


SAFETENSORS = Format("safetensors", "torch", read_safetensors, write_safetensors)
STATE_DICT = Format("torch", "torch", read_state_dict, write_state_dict)


def _is_described(loaded: dict[str, Any]) -> bool:
    """Return True for a file of `write_state_dict`, also of another version or damaged."""
    others = loaded.keys() - {"state_dict"}
    alone = bool(others) and others <= {"version", "module", "config"}
    return "state_dict" in loaded and ("version" in loaded or alone)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
