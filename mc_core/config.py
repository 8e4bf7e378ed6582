"""Configurations of memories, layers and models: frozen dataclasses, checked on construction."""

from dataclasses import dataclass
from typing import Any, ClassVar

from mc_core.checks import check_choice, check_range, check_types, fail
from mc_core.plain import Plain

AGGREGATIONS = ("none", "residual", "grm", "soup", "ssc", "mean")
GATED = ("grm", "soup", "ssc")
GATES = ("context", "token")
SEGMENTATIONS = ("constant", "logarithmic")
START_MODES = ("checkpoint", "restart")
COEFFICIENTS = ("constant", "head", "token")
MIXERS = ("memory", "attention", "window")
OUTPUT_NORMS = ("rms", "none")

NORM_EPS = 1e-6  # under the root of every RMS, layer and L2 norm
CLIP_EPS = 1e-12  # under the root of the inner gradient's Frobenius norm
NORMALIZER_FLOOR = 1e-6  # smallest denominator of a normalised linear read (equation 2)


@dataclass(frozen=True)
class LinearConfig(Plain):
    """Matrix memory, dot loss (equations 2 and 12): `W_t = α_t W_{t-1} + η_t v_t φ(k_t)ᵀ`.

    `step` is η and `retention` α: the constants, or the values at which learned ones start, which
    is at least a thousandth of its range away from either end: a retention of 1 starts at 0.999.
    `normalize` divides a read by `s·φ(q)`, s being the same sum of keys.
    """

    kind: ClassVar[str] = "linear"
    # Where a sigmoid takes a learned coefficient.
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
        _check_coefficients(self)


@dataclass(frozen=True)
class SWLAConfig(Plain):
    """Matrix memory with a window of two (equations 26 and 28).

    `W_t = α_t W_{t-1} + β_t v_{t-1} k_{t-1}ᵀ + λ_t v_t k_tᵀ`; `previous` is β, `newest` is λ.
    """

    kind: ClassVar[str] = "swla"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "newest": (0.0, 2.0),
        "retention": (0.0, 1.0),
        "previous": (-1.0, 1.0),
    }

    coefficients: str = "token"
    retention: float = 1.0
    previous: float = 0.0
    newest: float = 1.0
    learn_initial: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        _check_coefficients(self)


@dataclass(frozen=True)
class DLAConfig(Plain):
    """MLP memory trained by gradient steps on the dot loss (equation 30).

    `W_t = α_t W_{t-1} - η_t ∇ℓ(W_{t-1}; k_t, v_t)`. `inner_clip` bounds each token's gradient in
    each layer; None is the paper's recurrence. `norm="layer"` reads `x + LN(z)`, whatever
    `residual` says. Writes of a chunk add up at one memory, and a narrow memory (`expansion=1`) in
    short chunks takes larger steps than the default.
    """

    kind: ClassVar[str] = "dla"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"step": (0.0, 1.0), "retention": (0.0, 1.0)}

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: str = "none"  # none | layer
    objective: str = "dot"  # dot | l2
    inner_clip: float | None = 1.0
    coefficients: str = "token"
    step: float = 0.05
    retention: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        _check_mlp(self)
        _check_coefficients(self)


@dataclass(frozen=True)
class TitansConfig(Plain):
    """MLP memory trained by gradient steps with momentum on the L2 loss (equations 34 and 35).

    `S_t = β_t S_{t-1} - η_t ∇ℓ(W_{t-1}; k_t, v_t)`, `W_t = α_t W_{t-1} + S_t`; `momentum` is β.
    Options as in `DLAConfig`.
    """

    kind: ClassVar[str] = "titans"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        "step": (0.0, 1.0),
        "retention": (0.0, 1.0),
        "momentum": (0.0, 1.0),
    }

    depth: int = 2
    expansion: int = 4
    residual: bool = True
    norm: str = "none"
    objective: str = "l2"
    inner_clip: float | None = 1.0
    coefficients: str = "token"
    step: float = 0.02
    momentum: float = 0.9
    retention: float = 0.999

    def __post_init__(self) -> None:
        check_types(self)
        _check_mlp(self)
        _check_coefficients(self)


MemoryConfig = LinearConfig | SWLAConfig | DLAConfig | TitansConfig
MEMORIES: dict[str, type[MemoryConfig]] = {
    c.kind: c for c in (LinearConfig, SWLAConfig, DLAConfig, TitansConfig)
}


def _check_mlp(config: DLAConfig | TitansConfig) -> None:
    check_range(config, "depth", 1)
    check_range(config, "expansion", 1)
    check_choice(config, "norm", ("none", "layer"))
    check_choice(config, "objective", ("dot", "l2"))
    check_range(config, "inner_clip", 0.0, open_low=True)


def _check_coefficients(config: MemoryConfig) -> None:
    check_choice(config, "coefficients", COEFFICIENTS)
    learned = config.coefficients != "constant"
    for field, (low, high) in config.ranges.items():
        if field in ("retention", "momentum"):
            zero = field == "retention"
            check_range(config, field, low, high, open_low=zero, open_high=not zero)
        elif learned:
            check_range(config, field, low, high, open_low=field == "step")
        elif field == "step":
            check_range(config, field, 0.0, open_low=True)


@dataclass(frozen=True)
class MCConfig(Plain):
    """One Memory Caching layer (arXiv:2602.24281): a memory, its segments, and how they are read.

    Attributes:
        d_model: model width d, a multiple of `num_heads`.
        num_heads: heads h; key and value width are d / h.
        memory: one of the four memory configurations.
        aggregation: how online and cached memories are read (equations 7, 9, 15, 17).
        segmentation: how the tokens are cut (section 4.2).
        segment_size: tokens of a constant segment.
        state_init_mode: a segment starts at the state before it, or anew (section 3.4).
        ssc_top_k: cached memories that a token reads under `ssc`.
        use_q_as_u: the connector u is q, without a projection of its own.
        softmax_temperature: divides the gates' scores.
        pooling: a segment's pooled key is the mean or the sum of its keys.
        chunk_size: consecutive tokens whose inner gradients share one memory.
        qk_norm: `l2`, `none`, or None for the memory's default.
        conv_width: width of the causal depthwise convolution before q, k and v; 0 for none.
        output_norm: RMS norm of each head's read, or none.
        detach_cached_states: no gradient flows into cached memories.
        detach_cached_context: no gradient flows into cached pooled keys.
        gate: a memory's score is u times its pooled key (`context`, equation 10), or the component
            of u [k] for its level, by its age, as in arXiv:2506.04761 (`token`: no keys enter).

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    d_model: int
    num_heads: int
    memory: MemoryConfig = LinearConfig()
    aggregation: str = "grm"
    segmentation: str = "constant"
    segment_size: int = 256
    state_init_mode: str = "checkpoint"
    ssc_top_k: int = 2
    use_q_as_u: bool = False
    softmax_temperature: float = 1.0
    pooling: str = "mean"
    chunk_size: int = 64
    qk_norm: str | None = None
    conv_width: int = 0
    output_norm: str = "rms"
    detach_cached_states: bool = False
    detach_cached_context: bool = False
    gate: str = "context"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("d_model", "num_heads", "segment_size", "ssc_top_k", "chunk_size"):
            check_range(self, field, 1)
        check_range(self, "conv_width", 0)
        check_range(self, "softmax_temperature", 0.0, open_low=True)
        check_choice(self, "aggregation", AGGREGATIONS)
        check_choice(self, "segmentation", SEGMENTATIONS)
        check_choice(self, "state_init_mode", START_MODES)
        check_choice(self, "pooling", ("mean", "sum"))
        check_choice(self, "output_norm", OUTPUT_NORMS)
        check_choice(self, "gate", GATES)
        if self.qk_norm is not None:
            check_choice(self, "qk_norm", ("l2", "none"))
        if self.d_model % self.num_heads:
            fail("MCConfig", "d_model", self.d_model, f"a multiple of num_heads = {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """Key and value width of a head."""
        return self.d_model // self.num_heads

    @property
    def gated(self) -> bool:
        """Whether reads are weighted by scores of the connector u."""
        return self.aggregation in GATED

    @property
    def projects_u(self) -> bool:
        """Whether the connector u is a projection of its own."""
        return self.gated and not self.use_q_as_u

    @property
    def reads_sum(self) -> bool:
        """Whether all cached memories are read at once, as their sum (equation 7)."""
        memory = self.memory
        linear = memory.kind == "swla" or (
            isinstance(memory, LinearConfig) and not memory.normalize
        )
        return linear and self.aggregation in ("residual", "mean")

    def slots(self, tokens: int) -> int:
        """Return how many cached memories a stream of so many tokens keeps one by one."""
        if self.aggregation == "none" or self.reads_sum:
            return 0
        return -(-tokens // self.segment_size)

    @property
    def normalizes_qk(self) -> bool:
        """Whether the layer L2-normalises q and k; by default where an MLP memory is written."""
        if self.qk_norm is None:
            return self.memory.kind in ("dla", "titans")
        return self.qk_norm == "l2"

    @classmethod
    def _load(cls, key: str, value: Any) -> Any:
        if key != "memory" or not isinstance(value, dict):
            return value
        kind = value.get("kind")
        if kind not in MEMORIES:
            fail("MCConfig", "memory.kind", kind, "one of " + ", ".join(map(repr, MEMORIES)))
        return MEMORIES[kind].from_dict(value)


@dataclass(frozen=True)
class AttentionConfig(Plain):
    """One layer of causal softmax attention with rotary positions (RoPE, arXiv:2104.09864).

    Attributes:
        d_model: model width d, a multiple of 2 `num_heads`.
        num_heads: heads h; key and value width are d / h.
        window: tokens that a token sees, itself included; None = all before it.
        rope_base: pair i of a head's k / 2 pairs turns by `rope_base ** (-2i / k)` a token.
        conv_width: width of the causal depthwise convolution before q, k and v; 0 for none.
        output_norm: RMS norm of each head's read, or none.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    d_model: int
    num_heads: int
    window: int | None = None
    rope_base: float = 10000.0
    conv_width: int = 0
    output_norm: str = "rms"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("d_model", "num_heads", "window"):
            check_range(self, field, 1)
        check_range(self, "rope_base", 1.0)
        check_range(self, "conv_width", 0)
        check_choice(self, "output_norm", OUTPUT_NORMS)
        if self.d_model % (2 * self.num_heads):
            allowed = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            fail("AttentionConfig", "d_model", self.d_model, allowed)

    @property
    def head_dim(self) -> int:
        """Key and value width of a head."""
        return self.d_model // self.num_heads

    def slots(self, tokens: int) -> int:
        """Return how many keys and values a stream with room for so many tokens keeps."""
        return tokens if self.window is None else min(self.window, tokens)


@dataclass(frozen=True)
class ModelConfig(Plain):
    """A language model of pre-norm blocks: a mixer of tokens, then SwiGLU.

    Attributes:
        vocab_size: number of token ids.
        num_layers: blocks.
        layer: the memory layer; its `d_model` is the model's width. Attention has its heads,
            `conv_width` and `output_norm`.
        ffn_width: hidden width of the SwiGLU; None = 8/3 of the model's width, rounded up to 8;
            0 = blocks without one.
        tie_embeddings: the head is the embedding's transpose.
        remat: recompute each block's activations in the backward pass.
        mixers: what the blocks mix tokens with, repeated over them: `memory` (the layer),
            `attention` (causal softmax attention) or `window` (the same over few tokens).
        attention_window: tokens that a token sees in a `window` block, itself included.
        rope_base: of the rotary positions of `attention` and `window`.
    """

    vocab_size: int
    num_layers: int
    layer: MCConfig
    ffn_width: int | None = None
    tie_embeddings: bool = True
    remat: bool = False
    mixers: tuple[str, ...] = ("memory",)
    attention_window: int = 256
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("vocab_size", "num_layers", "attention_window"):
            check_range(self, field, 1)
        check_range(self, "ffn_width", 0)
        check_range(self, "rope_base", 1.0)
        known = all(mixer in MIXERS for mixer in self.mixers)
        if not known or not 1 <= len(self.mixers) <= self.num_layers:
            names = ", ".join(map(repr, MIXERS))
            allowed = f"1 to num_layers = {self.num_layers} words of {names}"
            fail("ModelConfig", "mixers", list(self.mixers), allowed)
        _ = self.block_layers  # holds the widths to what attention needs

    @property
    def name(self) -> str:
        """What mixes the tokens, in words: the pattern of mixers, the memory by kind and reads."""
        memory = f"{self.layer.memory.kind} + {self.layer.aggregation}"
        return ", ".join(memory if mixer == "memory" else mixer for mixer in self.mixers)

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU, 0 where there is none."""
        return -(-8 * self.layer.d_model // 24) * 8 if self.ffn_width is None else self.ffn_width

    @property
    def block_layers(self) -> tuple[MCConfig | AttentionConfig, ...]:
        """The configuration of each block's mixer."""
        made = {mixer: self._mixer(mixer) for mixer in self.mixers}
        return tuple(made[self.mixers[i % len(self.mixers)]] for i in range(self.num_layers))

    def _mixer(self, name: str) -> MCConfig | AttentionConfig:
        layer = self.layer
        if name == "memory":
            return layer
        return AttentionConfig(
            layer.d_model,
            layer.num_heads,
            window=self.attention_window if name == "window" else None,
            rope_base=self.rope_base,
            conv_width=layer.conv_width,
            output_norm=layer.output_norm,
        )

    @classmethod
    def _load(cls, key: str, value: Any) -> Any:
        if key == "mixers" and isinstance(value, str):
            return (value,)
        if key == "mixers" and isinstance(value, list):
            return tuple(value)
        return MCConfig.from_dict(value) if key == "layer" and isinstance(value, dict) else value
