"""Conversion of modules to and from flat tensors, and loading of weights on disk."""

from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import nn

from mc_core.prefixes import plain_names
from mc_core.pretrained import one_dtype
from mc_core.weight_sources import read_weights
from mc_core.weights import check_leaves, leaves
from mc_torch.numerics import Array, Dtype

Flat = dict[str, Array]


def get_weights(module: nn.Module) -> Flat:
    """Return every parameter; they share memory with the module.

    Keys are those of the `state_dict`, without what wrapped blocks and layers add to them.
    """
    state = module.state_dict()
    names, _ = plain_names(state)
    return {names[key]: x for key, x in state.items()}


def set_weights(module: nn.Module, flat: Flat) -> None:
    """Set the weights of a module in place; parameters keep their device.

    Raises:
        ValueError: a parameter is missing, unexpected, or of another shape or dtype; the message
            lists all mismatches. The module is then unchanged.
    """
    check_leaves(leaves(flat), leaves(get_weights(module)))
    names, _ = plain_names(module.state_dict())
    module.load_state_dict({key: flat[name] for key, name in names.items()})


def read_file(path: str | PathLike[str], kind: Any) -> tuple[Any, Flat]:
    """Return the configuration and the tensors, in PyTorch's layouts, of weights on disk.

    Arguments and errors are those of `mc_core.weight_sources.read_weights`.
    """
    config, tensors = read_weights(path, kind, "pt")
    return config, {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}


class Pretrained:
    """Mixin for modules that load configuration and weights from disk."""

    config_class: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ) -> Self:
        """Build from weights on disk; `dtype` = None uses that of the weights.

        Args:
            path: safetensors file of `mc convert`; for a language model also a folder of
                `mc export`, or a run directory, of which the last checkpoint is read.
            device: device of the parameters.
            dtype: dtype of the parameters.

        Raises:
            ValueError: the weights are damaged or do not match; the message lists all mismatches.
            OSError: a file cannot be read.
        """
        make: Any = cls
        config, tensors = read_file(path, cls.config_class)
        try:
            dtype = dtype or getattr(torch, one_dtype(leaves(tensors)))
            module = make(config, device=device, dtype=dtype)
            set_weights(module, {name: tensor.to(dtype) for name, tensor in tensors.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return module
