"""Configuration of the optimizer, shared by both frameworks."""

from collections.abc import Sequence
from dataclasses import dataclass

from mc_core.checks import check_choice, check_range

# Weight decay applies to JAX parameters with these names: projections and embeddings.
DECAYED = ("kernel", "embedding")

OPTIMIZERS = ("adamw", "lion", "muon")
SCHEDULES = ("cosine", "wsd", "constant")


def decays(name: str, axes: int) -> bool:
    """Return True if weight decay applies to a parameter.

    Gains, biases, scales, level scales and initial memories have no weight decay; memories have a
    retention.

    Args:
        name: name of the parameter in JAX.
        axes: number of its axes.
    """
    return name.rpartition(".")[2] in DECAYED and axes >= 2


def is_orthogonalized(path: Sequence[str]) -> bool:
    """Return True if Muon applies to a parameter: a matrix of a projection within a block.

    Muon is not applied to embeddings, the output head, coefficients, convolutions and vectors.

    Args:
        path: names of the modules that contain the JAX parameter, and its own name.
    """
    return len(path) > 1 and path[-1] == "kernel" and path[-2].endswith("_proj")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its learning rates, and the average of the parameters.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: number of steps of linear warm-up from 0 to the peak.
        final_fraction: learning rate of the last step, relative to the peak.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment of AdamW; of the momentum of Lion.
        eps: added to the square root of the second moment.
        weight_decay: applied to kernels and embeddings only.
        clip_norm: maximum global norm of the gradient; None = no clipping.
        name: `adamw`, `lion`, or `muon`: momentum orthogonalized by Newton-Schulz iterations, for
            the projections of the blocks; other parameters use AdamW. Muon's updates are scaled to
            a root mean square of 0.2, which AdamW's have, so that both share the learning rate.
        schedule: learning rates after the warm-up. `cosine`: decay to `final_fraction`. `wsd`
            (warm-up, stable, decay): constant, then linear decay to `final_fraction`. `constant`.
        decay_fraction: share of the run's steps in which `wsd` decays.
        momentum: decay rate of Muon's momentum.
        moment_dtype: dtype of the first moment or momentum, `float32` or `bfloat16`. The second
            moment is float32.
        ema_decay: decay rate per step of an exponential moving average of the parameters, which
            replaces them in evaluations; None = no average.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    name: str = "adamw"
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    momentum: float = 0.95
    moment_dtype: str = "float32"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            check_range(self, name, 0.0, open_low=True)
        for name in ("beta1", "beta2", "momentum"):
            check_range(self, name, 0.0, 1.0, open_high=True)
        check_range(self, "final_fraction", 0.0, 1.0)
        check_range(self, "decay_fraction", 0.0, 1.0, open_low=True)
        check_range(self, "ema_decay", 0.0, 1.0, open_low=True, open_high=True)
        for name in ("warmup_steps", "weight_decay"):
            check_range(self, name, 0)
        check_choice(self, "name", OPTIMIZERS)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "moment_dtype", ("float32", "bfloat16"))
