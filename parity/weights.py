"""Weights of a module as plain arrays, and from one framework to the other; no files here.

`to_torch` and `to_jax` go by the table in `mc_core.weights`; loading is strict: every parameter
once, in its shape and dtype, or an error that lists all that is wrong.
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
    """Put weights into a module, in place and on its device.

    Raises:
        ValueError: lists every parameter that is missing, unexpected, or of another shape or dtype;
            the module is as before.
    """
    set_weights(module, {name: to_tensor(array) for name, array in flat.items()})


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor, bit by bit."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
        return tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Copy an array to a tensor, bit by bit."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
