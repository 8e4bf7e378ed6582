"""Weights of a module as arrays, and their conversion between frameworks.

`to_torch` and `to_jax` use the table in `mc_core.weights`. Loading is strict: names, shapes and
dtypes must match, otherwise an error lists all mismatches.
"""

import ml_dtypes
import numpy as np
import torch

from mc_core.weights import Flat, to_jax, to_torch
from mc_jax.pretrained import get_weights as jax_weights
from mc_jax.pretrained import set_weights as load_jax
from mc_torch.pretrained import get_weights, set_weights

__all__ = ["Flat", "jax_weights", "load_jax", "load_torch", "to_jax", "to_torch", "torch_weights"]


def torch_weights(module: torch.nn.Module) -> Flat:
    """Return a copy of the module's `state_dict`; bfloat16 as `ml_dtypes.bfloat16`."""
    return {name: to_numpy(tensor) for name, tensor in get_weights(module).items()}


def load_torch(module: torch.nn.Module, flat: Flat) -> None:
    """Load weights into a module, in place and on its device.

    Raises:
        ValueError: parameters are missing, unexpected, or of another shape or dtype; lists all of
            them. The module is unchanged.
    """
    set_weights(module, {name: to_tensor(array) for name, array in flat.items()})


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to a NumPy array, bit-exactly."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy a NumPy array to a tensor, bit-exactly."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
