"""Costs of a training step; without JAX, which must start with the right number of devices."""

from collections.abc import Mapping
from dataclasses import dataclass

# Numbers of repetitions of a model's mixers from which the costs of more are extrapolated.
BLOCKS = (2, 3)


@dataclass(frozen=True)
class StepCosts:
    """Costs of a training step on one device.

    Attributes:
        parameters: bytes of parameters.
        optimizer: bytes of the optimizer's state.
        temporary: bytes of activations, gradients and other temporary arrays, at the peak.
        flops: FLOPs of matrix products.
        accessed: bytes that the instructions of the program read and write.
        sent: bytes that the device sends, by the mesh axes of the communicating devices.
        extrapolated: the last four are extrapolated from models of fewer blocks.
    """

    parameters: float
    optimizer: float
    temporary: float
    flops: float
    accessed: float
    sent: Mapping[tuple[str, ...], float]
    extrapolated: bool
