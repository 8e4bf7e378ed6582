"""Memory kinds. The configuration class of a kind declares all its properties.

To add a kind, register a configuration class with `register_memory` and a backend per framework
with `register_backend`; see `examples/custom_memory.py`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Self, TypeVar

from mc_core.checks import check_choice, check_range, check_types
from mc_core.serialization import Serializable, Tag

COEFFICIENTS = ("constant", "head", "token")
MEMORIES: dict[str, type["MemoryConfig"]] = {}  # by kind


@dataclass(frozen=True)
class MemoryConfig(Serializable):
    """Base class of memory configurations. The defaults describe a matrix memory with W_0 = 0.

    A subclass is a frozen dataclass with a field `coefficients` (one of `COEFFICIENTS`) and one
    field per write coefficient: its constant value, or the initial value of a learned one. Initial
    values are clipped to 0.1% of the range from its ends.

    Class attributes:
        kind: the memory's name in YAML files and on the command line.
        description: one line for help texts.
        ranges: (low, high) of each coefficient field; a learned coefficient is a sigmoid scaled to
            this range.
        coefficient_fields: name of the field for each coefficient of `memory_caching`.
        gradient_uses_weights: True if the inner gradient depends on the weights. It is then taken
            at the weights at the start of the chunk.
        uses_previous_token: True if the write of a token uses the previous token's key and value.
        normalizes_qk: True if q and k are L2-normalized by default.
    """

    tag: ClassVar[Tag] = Tag("kind", MEMORIES)

    kind: ClassVar[str]
    description: ClassVar[str]
    ranges: ClassVar[dict[str, tuple[float, float]]]
    coefficient_fields: ClassVar[dict[str, str]] = {"step": "step", "retention": "retention"}
    gradient_uses_weights: ClassVar[bool] = False
    uses_previous_token: ClassVar[bool] = False
    normalizes_qk: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        self._check_coefficients()

    @property
    def coefficient_mode(self) -> str:
        """The field `coefficients`: `constant`, `head` or `token`."""
        return vars(self)["coefficients"]

    @property
    def linear_in_weights(self) -> bool:
        """True if a read is linear in the weights: the read of a sum is the sum of the reads."""
        return True

    @property
    def has_momentum(self) -> bool:
        """True if the state includes momentum, of the same shape as the weights."""
        return "momentum" in self.coefficient_fields

    @property
    def has_layer_norm(self) -> bool:
        """True if reads apply a layer norm with learned gain and bias."""
        return False

    @property
    def has_l2_loss(self) -> bool:
        """True if the inner loss is a squared distance to v, False if it is `-<M(k), v>`."""
        return False

    @property
    def adds_input(self) -> bool:
        """True if reads have a residual connection, which requires equal key and value widths."""
        return False

    @property
    def random_initial(self) -> bool:
        """True if W_0 is initialized at random, not at zero."""
        return False

    @property
    def learns_initial(self) -> bool:
        """True if W_0 is a parameter."""
        return self.random_initial or bool(getattr(self, "learn_initial", False))

    @property
    def normalizer_rows(self) -> int:
        """Number of output rows of the weights that store the normalizer of a read."""
        return 0

    @property
    def state_copies(self) -> int:
        """Number of copies of the weights in the state: weights, momentum, start of the chunk."""
        return 1 + self.has_momentum + self.gradient_uses_weights

    def widths(self, key: int, value: int) -> tuple[int, ...]:
        """Return the layer widths of a head's memory, from `key` to `value`."""
        return key, value

    def sizes(self, key: int, value: int) -> list[int]:
        """Return the number of weights per layer of a head's memory, excluding normalizers."""
        return [a * b for a, b in pairwise(self.widths(key, value))]

    def gradient_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per token and head of the inner gradient's matrix products."""
        return 2 * sum(self.sizes(key, value)) * self.gradient_uses_weights

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (cls(),)

    def _check_coefficients(self) -> None:
        check_choice(self, "coefficients", COEFFICIENTS)
        learned = self.coefficient_mode != "constant"
        for field, (low, high) in self.ranges.items():
            if field == "retention":
                check_range(self, field, low, high, open_low=True)
            elif field == "momentum":
                check_range(self, field, low, high, open_high=True)
            elif learned:
                check_range(self, field, low, high, open_low=field == "step")
            elif field == "step":
                check_range(self, field, 0.0, open_low=True)


M = TypeVar("M", bound=MemoryConfig)


def register_memory(cls: type[M]) -> type[M]:
    """Register a memory under its `kind`, for YAML files, the command line and `from_dict`.

    Example:
        >>> @register_memory
        ... @dataclass(frozen=True)
        ... class OjaConfig(MemoryConfig):
        ...     kind = "oja"

    Raises:
        ValueError: the class lacks an attribute, or its `kind` is registered by another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, MemoryConfig)):
        raise ValueError(f"register_memory: {cls!r} must be a subclass of MemoryConfig")
    if "__dataclass_fields__" not in vars(cls):
        raise ValueError(f"register_memory: {cls.__name__} must be a dataclass(frozen=True)")
    fields = {field.name for field in dataclasses.fields(cls)}
    missing = [name for name in ("kind", "description", "ranges") if not hasattr(cls, name)]
    if missing:
        raise ValueError(f"register_memory: {cls.__name__} must define {', '.join(missing)}")
    needed = {"coefficients", *cls.ranges, *cls.coefficient_fields.values()}
    if absent := sorted(needed - fields):
        raise ValueError(f"register_memory: {cls.__name__} must have fields {', '.join(absent)}")
    if cls.gradient_uses_weights and cls.uses_previous_token:
        raise ValueError(
            f"register_memory: {cls.__name__} sets gradient_uses_weights and uses_previous_token: "
            "a memory may have only one of them"
        )
    if "momentum" in cls.coefficient_fields and not cls.gradient_uses_weights:
        raise ValueError(
            f"register_memory: {cls.__name__} uses momentum: gradient_uses_weights must be True"
        )
    known = MEMORIES.get(cls.kind)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ValueError(
            f"register_memory: kind = {cls.kind!r} is already registered by {known.__module__}."
            f"{known.__qualname__}: choose another name"
        )
    MEMORIES[cls.kind] = cls
    return cls


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


@dataclass(frozen=True)
class MLPConfig(MemoryConfig):
    """Base class of MLP memories trained by gradient steps.

    `inner_clip` bounds the Frobenius norm of each token's gradient in each layer; None is the
    papers' recurrence. With `norm="layer"` a read is `x + LN(z)`, regardless of `residual`. The
    default steps are tuned for chunks of 64. Writes of a chunk are summed, so short chunks need
    larger steps, especially for narrow memories (`expansion=1`).
    """

    gradient_uses_weights: ClassVar[bool] = True
    normalizes_qk: ClassVar[bool] = True

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: str = "none"  # none | layer
    objective: str = "dot"  # dot | l2
    inner_clip: float | None = 1.0
    coefficients: str = "token"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "depth", 1)
        check_range(self, "expansion", 1)
        check_choice(self, "norm", ("none", "layer"))
        check_choice(self, "objective", ("dot", "l2"))
        check_range(self, "inner_clip", 0.0, open_low=True)
        self._check_coefficients()

    @property
    def linear_in_weights(self) -> bool:
        """False, also for depth 1, which is treated as an MLP."""
        return False

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

    def widths(self, key: int, value: int) -> tuple[int, ...]:
        """Return the layer widths of a head's memory, from `key` to `value`."""
        return key, *[key * self.expansion] * (self.depth - 1), value

    def gradient_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per token and head of the inner forward and backward pass.

        With the dot loss and no norm, the gradient does not need the output of the last layer.
        """
        sizes = self.sizes(key, value)
        needs_output = self.has_l2_loss or self.has_layer_norm
        return 2 * (sum(sizes) - (not needs_output) * sizes[-1]) + 2 * (sum(sizes) - sizes[0])


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
        )
