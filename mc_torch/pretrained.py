"""Conversion of modules to and from flat tensors, and loading of safetensors files."""

from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import nn

from mc_core.prefixes import plain_names, strip_prefixes
from mc_core.pretrained import from_metadata, one_dtype
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
    """Return the configuration and the tensors of a safetensors file.

    Prefixes that wrappers add to names are removed and logged.

    Args:
        path: a file written by `mc convert`.
        kind: allowed class: that of a layer's configuration, `ModelConfig`, or a union of them.

    Raises:
        ValueError: the file is damaged, of another format or class, or its configuration is
            invalid.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = from_metadata(file.metadata(), kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return config, strip_prefixes(tensors, path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


class Pretrained:
    """Mixin for modules that load configuration and weights from a safetensors file."""

    config_class: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: Dtype = None,
    ) -> Self:
        """Build from a safetensors file; `dtype` = None uses that of the file.

        Raises:
            ValueError: the file is damaged or does not match; the message lists all mismatches.
            OSError: the file cannot be read.
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
