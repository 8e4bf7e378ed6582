"""Conversion of modules to and from flat arrays, and loading of safetensors files."""

from os import PathLike
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.prefixes import strip_prefixes
from mc_core.pretrained import from_metadata, one_dtype
from mc_core.weights import Flat, check_leaves, leaves, to_jax, to_torch
from mc_jax.numerics import Dtype


def get_weights(module: nnx.Module) -> Flat:
    """Return all parameters by their path, joined by "."; bfloat16 as `ml_dtypes.bfloat16`."""
    return {name: np.asarray(param[...]) for name, param in _params(module).items()}


def set_weights(module: nnx.Module, flat: Flat) -> None:
    """Set the weights of a module in place; parameters keep their sharding.

    Raises:
        ValueError: a parameter is missing, unexpected, or of another shape or dtype; the message
            lists all mismatches. The module is then unchanged.
    """
    params = _params(module)
    check_leaves(leaves(flat), leaves({name: param[...] for name, param in params.items()}))
    for name, param in params.items():
        param.set_value(jax.device_put(flat[name], param[...].sharding))


def read_file(path: str | PathLike[str], kind: Any) -> tuple[Any, Flat]:
    """Return the configuration of a safetensors file, and its tensors in PyTorch's layouts.

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
        with safe_open(path, framework="np") as file:
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
        cls, path: str | PathLike[str], *, dtype: Dtype = None, param_dtype: Dtype = None
    ) -> Self:
        """Build from a safetensors file; `param_dtype` = None uses that of the file.

        Raises:
            ValueError: the file is damaged or does not match; the message lists all mismatches.
            OSError: the file cannot be read.
        """
        make: Any = cls
        config, tensors = read_file(path, cls.config_class)
        try:
            param_dtype = jnp.dtype(param_dtype or one_dtype(leaves(tensors)))
            if jax.dtypes.canonicalize_dtype(param_dtype) != param_dtype:
                raise ValueError(f"parameters of {param_dtype}: need jax.enable_x64(True)")
            module = make(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
            tensors = {name: array.astype(param_dtype) for name, array in tensors.items()}
            # Check by the names of the file: renaming would raise at the first unknown name.
            check_leaves(leaves(tensors), leaves(to_torch(get_weights(module))))
            set_weights(module, to_jax(tensors))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return module


def _params(module: nnx.Module) -> dict[str, nnx.Param]:
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nnx.Param)
    }
