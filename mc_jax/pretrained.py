"""Conversion of modules to and from flat arrays, and loading of weights on disk."""

from os import PathLike
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.pretrained import one_dtype
from mc_core.weight_sources import read_weights
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
    """Return the configuration and the tensors, in PyTorch's layouts, of weights on disk.

    Arguments and errors are those of `mc_core.weight_sources.read_weights`.
    """
    return read_weights(path, kind, "np")


class Pretrained:
    """Mixin for modules that load configuration and weights from disk."""

    config_class: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, dtype: Dtype = None, param_dtype: Dtype = None
    ) -> Self:
        """Build from weights on disk; `param_dtype` = None uses that of the weights.

        Args:
            path: safetensors file of `mc convert`; for a language model also a folder of
                `mc export`, or a run directory, of which the last checkpoint is read.
            dtype: compute dtype; None = that of the parameters.
            param_dtype: dtype of the parameters.

        Raises:
            ValueError: the weights are damaged or do not match; the message lists all mismatches.
            OSError: a file cannot be read.
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
