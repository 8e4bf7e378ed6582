"""Memory kinds. The configuration class of a kind declares all its properties.

To add a kind, register a configuration class with `register_memory` and a backend per framework
with `register_backend`; see `examples/custom_memory.py`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Self, TypeVar

from mc_core.checks import check_choice, check_range, check_types, raise_config_error
from mc_core.serialization import Serializable, Tag

COEFFICIENTS = ("constant", "head", "token")
MEMORIES: dict[str, type["MemoryConfig"]] = {}  # by kind


@dataclass(frozen=True)
class MemoryConfig(Serializable):
    """Base class of memory configurations. The defaults describe a matrix memory with W_0 = 0.

    A subclass is a frozen dataclass with a field `coefficients` (one of `COEFFICIENTS`) and one
    field per write coefficient: its constant value, or the initial value of a learned one. Initial
    values are clipped to 0.1% of the range from its ends.

    Attributes:
        min_retention: lower end of the range of a learned retention, in [0, 1). After n further
            tokens, retention alone has left at least `min_retention ** n` of a write.

    Class attributes:
        kind: the memory's name in YAML files and on the command line.
        description: one line for help texts.
        ranges: (low, high) of each coefficient field; a learned coefficient is a sigmoid scaled to
            this range.
        coefficient_fields: name of the field for each coefficient of `memory_caching`.
        gradient_uses_weights: True if the inner gradient is taken at the weights at the start of
            the chunk, and depends on them.
        delta_rule: True if the error of token t is `α_t W_{t-1} a_t + e_t`, for every chunk size.
            The backend's `rank_one_updates` then returns a_t and e_t, those of the zero memory.
        updates_at_chunk_end: True if the backend's `end_chunk` changes the memory after the last
            token of each chunk. `gradient_uses_weights` must be True.
        uses_previous_token: True if the write of a token uses the previous token's key and value.
        normalizes_qk: True if q and k are L2-normalized by default.
        decay_only_transition: True if a write is `W_t = α_t W_{t-1} + U_t`, with α_t the retention
            and U_t independent of the memory, so that states of segments can be added.
    """

    tag: ClassVar[Tag] = Tag("kind", MEMORIES)

    min_retention: float = field(default=0.0, kw_only=True)

    kind: ClassVar[str]
    description: ClassVar[str]
    ranges: ClassVar[dict[str, tuple[float, float]]]
    coefficient_fields: ClassVar[dict[str, str]] = {"step": "step", "retention": "retention"}
    gradient_uses_weights: ClassVar[bool] = False
    delta_rule: ClassVar[bool] = False
    updates_at_chunk_end: ClassVar[bool] = False
    uses_previous_token: ClassVar[bool] = False
    normalizes_qk: ClassVar[bool] = False
    decay_only_transition: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_types(self)
        self._check_coefficients()

    @property
    def coefficient_mode(self) -> str:
        """The field `coefficients`: `constant`, `head` or `token`."""
        return vars(self)["coefficients"]

    def coefficient_range(self, name: str) -> tuple[float, float]:
        """Return (low, high) of a learned coefficient, by the name of its field."""
        low, high = self.ranges[name]
        return (self.min_retention if name == self._retention else low), high

    @property
    def _retention(self) -> str:
        """Name of the field of the retention."""
        return self.coefficient_fields["retention"]

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

    def initial_draws(self, layers: int) -> tuple[str, ...]:
        """Return how each layer of W_0 is initialized: `zero`, `normal` or `orthogonal`."""
        return ("normal" if self.random_initial else "zero",) * layers

    @property
    def learns_initial(self) -> bool:
        """True if W_0 is a parameter."""
        return self.random_initial or bool(getattr(self, "learn_initial", False))

    @property
    def decays_to_initial(self) -> bool:
        """True if retention decays the weights to W_0, not to zero."""
        return False

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

    @property
    def fixed_layers(self) -> int:
        """Number of first layers that are parameters only, not part of the state."""
        return 0

    def sizes(self, key: int, value: int) -> list[int]:
        """Return the number of weights per layer of a head's memory, excluding normalizers."""
        return [a * b for a, b in pairwise(self.widths(key, value))]

    def state_size(self, key: int, value: int) -> int:
        """Return the number of weights of a head's state, excluding normalizers and momentum."""
        return sum(self.sizes(key, value)[self.fixed_layers :])

    def gradient_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per token and head of the inner gradient's matrix products."""
        return 2 * sum(self.sizes(key, value)) * self.gradient_uses_weights

    def chunk_end_flops(self, key: int, value: int) -> int:
        """Return the FLOPs per chunk and head of the matrix products at the end of a chunk."""
        return 0

    @classmethod
    def variants(cls) -> Sequence[Self]:
        """Return small configurations that together cover the options of this kind."""
        return (cls(),)

    def _check_coefficients(self) -> None:
        check_choice(self, "coefficients", COEFFICIENTS)
        learned = self.coefficient_mode != "constant"
        if self.updates_at_chunk_end and not self.gradient_uses_weights:
            reason = "False, because gradient_uses_weights is False"
            raise_config_error(type(self).__name__, "updates_at_chunk_end", True, reason)
        check_range(self, "min_retention", 0.0, 1.0, open_high=True)
        if self.min_retention and not learned:
            reason = "0.0 if coefficients = 'constant'"
            raise_config_error(type(self).__name__, "min_retention", self.min_retention, reason)
        for name in self.ranges:
            low, high = self.coefficient_range(name)
            if name == self._retention:
                reason = f" if min_retention = {low}" if low else ""
                check_range(self, name, low, high, open_low=low == 0.0, reason=reason)
            elif name == "momentum":
                check_range(self, name, low, high, open_high=True)
            elif learned:
                check_range(self, name, low, high, open_low=name == "step")
            elif name == "step":
                check_range(self, name, 0.0, open_low=True)


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
    for flag in ("gradient_uses_weights", "delta_rule"):
        if getattr(cls, flag) and cls.uses_previous_token:
            raise ValueError(
                f"register_memory: {cls.__name__} sets {flag} and uses_previous_token: "
                "a memory may have only one of them"
            )
    if cls.updates_at_chunk_end is True and not cls.gradient_uses_weights:
        raise ValueError(
            f"register_memory: {cls.__name__} sets updates_at_chunk_end: gradient_uses_weights "
            "must be True, because the state then has the memory at the start of the chunk"
        )
    if cls.decay_only_transition and (cls.gradient_uses_weights or cls.delta_rule is True):
        raise ValueError(
            f"register_memory: {cls.__name__} sets decay_only_transition: gradient_uses_weights "
            "and delta_rule must be False, because writes must not depend on the memory"
        )
    if "momentum" in cls.coefficient_fields and not (cls.gradient_uses_weights or cls.delta_rule):
        raise ValueError(
            f"register_memory: {cls.__name__} uses momentum: gradient_uses_weights or delta_rule "
            "must be True"
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
