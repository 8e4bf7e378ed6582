"""Configuration of AdamW, shared by both frameworks."""

from dataclasses import dataclass

from mc_core.checks import check_range

# Weight decay applies to JAX parameters with these names: projections and embeddings.
DECAYED = ("kernel", "embedding")


def decays(name: str, axes: int) -> bool:
    """Return True if weight decay applies to a parameter.

    Gains, biases, scales, level scales and initial memories have no weight decay; memories have a
    retention.

    Args:
        name: name of the parameter in JAX.
        axes: number of its axes.
    """
    return name.rpartition(".")[2] in DECAYED and axes >= 2


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to `final_fraction` of the peak.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: number of steps of linear warm-up from 0 to the peak.
        final_fraction: learning rate of the last step, relative to the peak.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: applied to kernels and embeddings only.
        clip_norm: maximum global norm of the gradient; None = no clipping.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            check_range(self, name, 0.0, open_low=True)
        for name in ("beta1", "beta2"):
            check_range(self, name, 0.0, 1.0, open_high=True)
        check_range(self, "final_fraction", 0.0, 1.0)
        for name in ("warmup_steps", "weight_decay"):
            check_range(self, name, 0)
