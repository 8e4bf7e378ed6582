"""Configurations of the built-in memory kinds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self

from mc_core.checks import check_choice, check_range, check_types, raise_config_error
from mc_core.memories import MemoryConfig, register_memory

NEWTON_SCHULZ_STEPS = 5
# (a, b, c) of an iteration `X <- a X + (b X Xᵀ + c (X Xᵀ)²) X`, as in Muon. After five iterations,
# singular values from 0.002 to 1 are between 0.68 and 1.21.
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


@register_memory
@dataclass(frozen=True)
class LinearConfig(MemoryConfig):
    """Matrix memory, dot loss (equations 2 and 12): `W_t = α_t W_{t-1} + η_t v_t φ(k_t)ᵀ`.

    `step` is η and `retention` α. `normalize` divides a read by `s·φ(q)`, where s is the same
    decayed sum of feature-mapped keys.
    """

    kind: ClassVar[str] = "linear"
    description: ClassVar[str] = "matrix, dot loss: linear attention"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"step": (0.0, 2.0), "retention": (0.0, 1.0)}
    decay_only_transition: ClassVar[bool] = True

    feature_map: str = "identity"  # identity | elu+1
    normalize: bool = False
    coefficients: str = "constant"  # constant | head | token
    step: float = 1.0
    retention: float = 1.0
    learn_initial: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "feature_map", ("identity", "elu+1"))
        self._check_coefficients()

    @property
    def linear_in_weights(self) -> bool:
        """True if reads are not normalized."""
        return not self.normalize

    @property
    def normalizer_rows(self) -> int:
        """1 if reads are normalized, because s is stored as an additional output row of W."""
        return int(self.normalize)

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (
            cls(),
            cls("elu+1"),
            cls("elu+1", normalize=True, coefficients="token", retention=0.9),
            cls(coefficients="head", learn_initial=True),
        )


@register_memory
@dataclass(frozen=True)
class SWLAConfig(MemoryConfig):
    """Matrix memory with a window of two (equations 26 and 28).

    `W_t = α_t W_{t-1} + β_t v_{t-1} k_{t-1}ᵀ + λ_t v_t k_tᵀ`; `previous` is β, `newest` is λ.
    """

    kind: ClassVar[str] = "swla"
    description: ClassVar[str] = (
        "matrix, dot loss over the last two tokens: sliding-window linear attention"
    )
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "newest": (0.0, 2.0),
        "retention": (0.0, 1.0),
        "previous": (-1.0, 1.0),
    }
    coefficient_fields: ClassVar[dict[str, str]] = {
        "step": "newest",
        "retention": "retention",
        "previous": "previous",
    }
    uses_previous_token: ClassVar[bool] = True
    decay_only_transition: ClassVar[bool] = True

    coefficients: str = "token"
    retention: float = 1.0
    previous: float = 0.0
    newest: float = 1.0
    learn_initial: bool = False

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (
            cls(),
            cls(coefficients="head", learn_initial=True),
            cls(coefficients="constant", retention=0.9, previous=-0.3),
        )


@register_memory
@dataclass(frozen=True)
class DeltaConfig(MemoryConfig):
    """Matrix memory of the gated delta rule (arXiv:2412.06464).

    `W_t = α_t W_{t-1} (I - β_t k_t k_tᵀ) + β_t v_t k_tᵀ`; `step` is β and `retention` α. Exact for
    every chunk size.
    """

    kind: ClassVar[str] = "delta"
    description: ClassVar[str] = "matrix, one exact step per token on the L2 loss: gated delta rule"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "step": (0.0, 1.0),
        "retention": (0.0, 1.0),
    }
    normalizes_qk: ClassVar[bool] = True
    delta_rule: ClassVar[bool] = True
    has_l2_loss: ClassVar[bool] = True

    coefficients: str = "token"
    step: float = 0.5
    retention: float = 1.0
    learn_initial: bool = False

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (
            cls(),
            cls(coefficients="head", learn_initial=True),
            cls(coefficients="constant", retention=0.9),
        )


@dataclass(frozen=True)
class MLPConfig(MemoryConfig):
    """Base class of MLP memories trained by gradient steps.

    `inner_clip` bounds the Frobenius norm of each token's gradient in each layer; None is the
    papers' recurrence. With `norm="layer"` a read is `x + LN(z)`, regardless of `residual`. With
    `retention_target="initial"` the retained memory is `W_0 + α_t (W_{t-1} - W_0)` in place of
    `α_t W_{t-1}`, which decays to zero weights, where all gradients of an MLP vanish. With
    `written_layers="last"` only the last layer is a memory; the others are parameters, whose output
    is standardized and scaled to norm 1. With the L2 loss, writes then follow the delta rule,
    exactly for every chunk size: the gradient of half the loss is taken at the memory before each
    token, after its decay, and the step is `η_t (1 - β_t)`, so that no step in (0, 1) overshoots.
    `inner_clip` must be None, `norm` "none" and `residual` False.
    `initial_weights` initializes the parameters W_0: `normal` draws all weights with variance
    1 / fan-in. `orthogonal` draws all layers but the last with orthogonal rows or columns and the
    same mean square, so that different keys stay apart, and starts the last layer at zero, like a
    matrix memory. With `chunk_update="orthogonal"` each layer's update by a chunk is replaced,
    after the chunk's last token, by one of the same Frobenius norm and almost equal singular values
    (Newton-Schulz iterations, as in Muon), so that rare keys are written as strongly as frequent
    ones. `written_layers` must be "all". The default steps are tuned for chunks of 64. Writes of a
    chunk are summed, so short chunks need larger steps, especially for narrow memories
    (`expansion=1`).
    """

    normalizes_qk: ClassVar[bool] = True

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: str = "none"  # none | layer
    objective: str = "dot"  # dot | l2
    inner_clip: float | None = 1.0
    retention_target: str = "zero"  # zero | initial
    written_layers: str = "all"  # all | last
    initial_weights: str = "normal"  # normal | orthogonal
    chunk_update: str = "sum"  # sum | orthogonal
    coefficients: str = "token"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "depth", 1)
        check_range(self, "expansion", 1)
        check_choice(self, "norm", ("none", "layer"))
        check_choice(self, "objective", ("dot", "l2"))
        check_choice(self, "retention_target", ("zero", "initial"))
        check_choice(self, "written_layers", ("all", "last"))
        check_choice(self, "initial_weights", ("normal", "orthogonal"))
        check_choice(self, "chunk_update", ("sum", "orthogonal"))
        check_range(self, "inner_clip", 0.0, open_low=True)
        if self.written_layers == "last":
            # A clipped or normalized error is not affine in the weights, and the delta rule would
            # not be exact for every chunk size.
            needed = [("inner_clip", None), ("norm", "none"), ("residual", False)]
            needed += [("chunk_update", "sum")]
            needed += [("objective", "l2")] * self.has_momentum
            for field, allowed in needed:
                if (value := getattr(self, field)) != allowed:
                    reason = f"{allowed!r} if written_layers = 'last'"
                    raise_config_error(type(self).__name__, field, value, reason)
        self._check_coefficients()

    @property
    def linear_in_weights(self) -> bool:
        """True if only the last layer is written.

        False for all other memories of depth 1, which are treated as MLPs.
        """
        return self.written_layers == "last"

    @property
    def gradient_uses_weights(self) -> bool:  # type: ignore[override]
        """True if all layers are written."""
        return self.written_layers == "all"

    @property
    def updates_at_chunk_end(self) -> bool:  # type: ignore[override]
        """True if the updates of chunks are orthogonalized."""
        return self.chunk_update == "orthogonal"

    @property
    def delta_rule(self) -> bool:  # type: ignore[override]
        """True if only the last layer is written, in which an error is affine."""
        return self.written_layers == "last" and self.has_l2_loss

    @property
    def fixed_layers(self) -> int:
        """All layers but the last if only that one is written."""
        return self.depth - 1 if self.written_layers == "last" else 0

    @property
    def has_layer_norm(self) -> bool:
        """True if reads apply a layer norm with learned gain and bias."""
        return self.norm == "layer"

    @property
    def has_l2_loss(self) -> bool:
        """True if the inner loss is `||M(k) - v||²`."""
        return self.objective == "l2"

    @property
    def adds_input(self) -> bool:
        """True if a read adds its input."""
        return self.residual or self.has_layer_norm

    @property
    def random_initial(self) -> bool:
        """True, because all gradients of an MLP with zero weights vanish."""
        return True

    def initial_draws(self, layers: int) -> tuple[str, ...]:
        """Return how each layer of W_0 is initialized: `zero`, `normal` or `orthogonal`."""
        if self.initial_weights == "normal":
            return super().initial_draws(layers)
        return (*["orthogonal"] * (layers - 1), "zero")

    @property
    def decays_to_initial(self) -> bool:
        """True if retention decays the weights to W_0, not to zero."""
        return self.retention_target == "initial"

    def widths(self, key: int, value: int) -> tuple[int, ...]:
        """Return the layer widths of a head's memory, from `key` to `value`."""
        return key, *[key * self.expansion] * (self.depth - 1), value

    def gradient_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per token and head of the inner forward and backward pass.

        With the dot loss and no norm, the gradient does not need the output of the last layer.
        """
        sizes = self.sizes(key, value)
        if self.written_layers == "last":
            return 0
        needs_output = self.objective == "l2" or self.has_layer_norm
        return 2 * (sum(sizes) - (not needs_output) * sizes[-1]) + 2 * (sum(sizes) - sizes[0])

    def chunk_end_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per chunk and head of the Newton-Schulz iterations."""
        if not self.updates_at_chunk_end:
            return 0
        layers = pairwise(self.widths(key, value))
        return NEWTON_SCHULZ_STEPS * sum(
            4 * a * b * min(a, b) + 2 * min(a, b) ** 3 for a, b in layers
        )


@register_memory
@dataclass(frozen=True)
class DLAConfig(MLPConfig):
    """MLP memory trained by gradient steps on the dot loss (equation 30).

    `W_t = α_t W_{t-1} - η_t ∇ℓ(W_{t-1}; k_t, v_t)`. Options as in `MLPConfig`.
    """

    kind: ClassVar[str] = "dla"
    description: ClassVar[str] = "MLP, gradient steps on the dot loss: deep linear attention"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"step": (0.0, 1.0), "retention": (0.0, 1.0)}

    step: float = 0.05
    retention: float = 1.0

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (
            cls(expansion=2),
            cls(depth=1, residual=False, coefficients="head"),
            cls(depth=3, expansion=1, objective="l2", residual=False),
            cls(expansion=1, norm="layer", inner_clip=0.5, coefficients="constant"),
            cls(expansion=1, retention=0.9, retention_target="initial"),
            cls(expansion=2, retention=0.9, chunk_update="orthogonal"),
            cls(expansion=2, written_layers="last", inner_clip=None, residual=False),
        )


@register_memory
@dataclass(frozen=True)
class TitansConfig(MLPConfig):
    """MLP memory trained by gradient steps with momentum on the L2 loss (equations 34 and 35).

    `S_t = β_t S_{t-1} - η_t ∇ℓ(W_{t-1}; k_t, v_t)`, `W_t = α_t W_{t-1} + S_t`; `momentum` is β.
    Options as in `MLPConfig`.
    """

    kind: ClassVar[str] = "titans"
    description: ClassVar[str] = "MLP, gradient steps with momentum on the L2 loss: Titans"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "step": (0.0, 1.0),
        "retention": (0.0, 1.0),
        "momentum": (0.0, 1.0),
    }
    coefficient_fields: ClassVar[dict[str, str]] = {
        "step": "step",
        "retention": "retention",
        "momentum": "momentum",
    }

    objective: str = "l2"
    step: float = 0.02
    momentum: float = 0.9
    retention: float = 0.999

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (
            cls(expansion=2),
            cls(depth=1, inner_clip=None, coefficients="constant"),
            cls(expansion=1, norm="layer", inner_clip=0.5, coefficients="head"),
            cls(depth=3, expansion=1, objective="dot"),
            cls(expansion=1, retention_target="initial"),
            cls(expansion=1, retention=0.9, retention_target="initial", chunk_update="orthogonal"),
            cls(expansion=2, written_layers="last", inner_clip=None, residual=False),
        )
