"""Configurations of layers and models: frozen dataclasses, checked on construction."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from mc_core.aggregations import AGGREGATIONS, Aggregation
from mc_core.attention import OUTPUT_NORMS, AttentionConfig
from mc_core.checks import ConfigError, check_choice, check_range, check_types, raise_config_error
from mc_core.log_linear import MAX_LEVELS, LogLinearConfig
from mc_core.memories import MemoryConfig
from mc_core.memory_kinds import LinearConfig
from mc_core.serialization import Serializable

GATES = {
    "context": "grm, soup, ssc: scores are inner products of the connector u and pooled keys",
    "token": "grm, soup, ssc: scores are components of the connector u, by the age of the memory",
}
FENWICK = "fenwick"
SEGMENTATIONS = {
    "constant": "segments of segment_size tokens; the last one may be shorter",
    "logarithmic": "the powers of two that sum to the length, largest first; cannot stream",
    FENWICK: "per token, the powers of two that sum to its number of complete segments of "
    "segment_size tokens, largest first; at most log2 + 1 cached memories",
}
PRESETS = {"log_linear_pp": "Log-Linear++, the paper's baseline: grm over fenwick segments"}
START_MODES = ("checkpoint", "restart")
VALUE_NORMS = ("none", "l2", "rms")

NORM_EPS = 1e-6  # added to the mean or sum of squares in RMS, layer and L2 norms
CLIP_EPS = 1e-12  # added to the squared Frobenius norm of the inner gradient
UPDATE_EPS = 1e-12  # updates of at most this squared Frobenius norm are not orthogonalized
NORMALIZER_FLOOR = 1e-6  # smallest denominator of a normalized linear read (equation 2)
DEAD_NORM = 1e-3  # share of the norm of W_0 that no update of a dead head exceeds


@dataclass(frozen=True)
class MCConfig(Serializable):
    """Memory Caching layer (arXiv:2602.24281): a memory, its segments and their aggregation.

    Attributes:
        d_model: model width d, a multiple of `num_heads`.
        num_heads: number of heads h; the key and value width is d / h.
        memory: configuration of the memory.
        aggregation: combination of online and cached memories (equations 7, 9, 15, 17).
        segmentation: rule for the segment lengths (section 4.2). Under `fenwick`, the cached
            memories of a token are buckets of 1, 2, 4, ... complete segments.
        segment_size: number of tokens per segment under `constant` and `fenwick`.
        state_init_mode: a segment starts from the previous state (`checkpoint`) or from the initial
            memory (`restart`; section 3.4). A bucket's memory is the running state at its last
            token (`checkpoint`), or the sum of its segments' states, each decayed by the later
            segments of the bucket (`restart`). A state is all that retention decays: weights, with
            the initial memory of every segment, and normalizer. No segment has a previous token.
        ssc_top_k: number of cached memories that each token reads under `ssc`.
        use_q_as_u: use q as the connector u, without a separate projection.
        softmax_temperature: divisor of the scores before the softmax, or `learned`: a parameter per
            head that starts at 1.
        pooling: reduction of a segment's keys to its pooled key, `mean` or `sum`.
        chunk_size: number of consecutive tokens with inner gradients at the same weights.
        qk_norm: `l2`, `none`, or None for the memory's default.
        value_norm: norm of each head's values, `l2` or `rms`, or `none`.
        conv_width: width of the causal depthwise convolution before q, k and v; 0 for none.
        output_norm: RMS norm of each head's read (`rms`), or `none`.
        detach_cached_states: stop gradients at cached memories.
        detach_cached_context: stop gradients at cached pooled keys.
        gate: score of a memory: the inner product of u and its pooled key (`context`, equation 10),
            or the component of u at the memory's level (`token`, arXiv:2506.04761). The level is
            1 + floor(log2(age)), with the age in segments, and 0 for the online memory. The level
            of a bucket of 2^e segments is 1 + e.
        gate_bias: initial value of a learned bias per head that is added to the score of the online
            memory, before the division by the temperature; None = no bias.
        pool_norm: L2 norm of pooled keys (`l2`), or `none`.

    Raises:
        ValueError: a field is invalid; the message states its value and the allowed values.
    """

    d_model: int
    num_heads: int
    memory: MemoryConfig = LinearConfig()  # noqa: RUF009 - frozen
    aggregation: str = "grm"
    segmentation: str = "constant"
    segment_size: int = 256
    state_init_mode: str = "checkpoint"
    ssc_top_k: int = 2
    use_q_as_u: bool = False
    softmax_temperature: float | str = 1.0
    pooling: str = "mean"
    chunk_size: int = 64
    qk_norm: str | None = None
    conv_width: int = 0
    output_norm: str = "rms"
    detach_cached_states: bool = False
    detach_cached_context: bool = False
    gate: str = "context"
    value_norm: str = "none"
    gate_bias: float | None = None
    pool_norm: str = "none"

    @classmethod
    def log_linear_pp(
        cls, d_model: int, num_heads: int, memory: MemoryConfig = LinearConfig(), **fields: Any
    ) -> Self:
        """Return Log-Linear++, the paper's baseline: `grm` over `fenwick` segments.

        Args:
            d_model: model width d.
            num_heads: number of heads h.
            memory: configuration of the memory.
            fields: other fields.
        """
        fields = {"aggregation": "grm", "segmentation": FENWICK} | fields
        return cls(d_model, num_heads, memory, **fields)

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("d_model", "num_heads", "segment_size", "ssc_top_k", "chunk_size"):
            check_range(self, field, 1)
        check_range(self, "conv_width", 0)
        temperature = self.softmax_temperature
        if temperature != "learned" and (isinstance(temperature, str) or temperature <= 0.0):
            allowed = "> 0.0 or 'learned'"
            raise_config_error("MCConfig", "softmax_temperature", temperature, allowed)
        check_choice(self, "aggregation", AGGREGATIONS)
        check_choice(self, "segmentation", SEGMENTATIONS)
        check_choice(self, "state_init_mode", START_MODES)
        if self.sums_states and not self.memory.decay_only_transition:
            allowed = f"'checkpoint' for {FENWICK} segments of a {self.memory.kind} memory"
            raise_config_error("MCConfig", "state_init_mode", self.state_init_mode, allowed)
        check_choice(self, "pooling", ("mean", "sum"))
        check_choice(self, "output_norm", OUTPUT_NORMS)
        check_choice(self, "gate", GATES)
        check_choice(self, "value_norm", VALUE_NORMS)
        check_choice(self, "pool_norm", ("none", "l2"))
        if self.qk_norm is not None:
            check_choice(self, "qk_norm", ("l2", "none"))
        if self.d_model % self.num_heads:
            raise_config_error(
                "MCConfig", "d_model", self.d_model, f"a multiple of num_heads = {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Key and value width of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads

    @property
    def rule(self) -> Aggregation:
        """The properties of the aggregation."""
        return AGGREGATIONS[self.aggregation]

    @property
    def gated(self) -> bool:
        """True if reads are weighted by scores of the connector u."""
        return self.rule.gated

    @property
    def projects_u(self) -> bool:
        """True if the connector u is a separate projection."""
        return self.gated and not self.use_q_as_u

    @property
    def has_gate_bias(self) -> bool:
        """True if a learned bias is added to the online memory's score."""
        return self.gated and self.gate_bias is not None

    @property
    def learns_temperature(self) -> bool:
        """True if the temperature is a parameter of the layer."""
        return self.gated and self.softmax_temperature == "learned"

    @property
    def score_divisor(self) -> float:
        """Constant divisor of the scores; 1 if the temperature is learned.

        A layer divides the connector and the bias by a learned temperature, because the scores are
        linear in them.
        """
        temperature = self.softmax_temperature
        return 1.0 if isinstance(temperature, str) else temperature

    @property
    def has_buckets(self) -> bool:
        """True if the cached memories of a token are buckets of segments."""
        return self.segmentation == FENWICK

    @property
    def sums_states(self) -> bool:
        """True if a bucket's memory is the decayed sum of its segments' states."""
        return self.has_buckets and self.state_init_mode == "restart"

    @property
    def reads_sum(self) -> bool:
        """True if all cached memories are read as one sum of weights (equation 7).

        False for buckets, because a stream cannot accumulate their sum.
        """
        rule = self.rule
        linear = self.memory.linear_in_weights and not self.has_buckets
        return rule.reads_cache and not rule.gated and linear

    @property
    def mixes_layers(self) -> bool:
        """True if reads mix the weights layer by layer (equation 15).

        False if reads are linear in the weights, because the read of a mixture of weights is then
        the mixture of the reads.
        """
        return self.rule.mixes_weights and not self.memory.linear_in_weights

    def slots(self, tokens: int) -> int:
        """Return the number of slots for cached memories in a stream of `tokens` tokens."""
        if not self.rule.reads_cache or self.reads_sum:
            return 0
        segments = -(-tokens // self.segment_size)
        return segments.bit_length() if self.has_buckets else segments

    @property
    def normalizes_qk(self) -> bool:
        """True if the layer L2-normalizes q and k."""
        return self.memory.normalizes_qk if self.qk_norm is None else self.qk_norm == "l2"


REMATS = ("none", "full", "dots")
SCANNED = 4  # repetitions of a model's mixers that are scanned by default
LayerConfig = MCConfig | AttentionConfig | LogLinearConfig


@dataclass(frozen=True)
class ModelConfig(Serializable):
    """Language model with pre-norm blocks, each a token mixer and a SwiGLU.

    Attributes:
        vocab_size: number of token ids.
        num_layers: number of blocks.
        layer: configuration of memory layers. Other mixers use the same `d_model`, `num_heads`,
            `conv_width` and `output_norm`; `log_linear` also `qk_norm` and `chunk_size`, rounded
            down to a power of two.
        ffn_width: hidden width of the SwiGLU; None = 8/3 of the model's width, rounded up to a
            multiple of 8; 0 = no SwiGLU.
        tie_embeddings: the output head is the embedding's transpose.
        remat: activations of a block that the backward pass recomputes: `none`, `full` (all but the
            block's input), or `dots` (all but its input and the products of tokens with weights).
            False and True mean `none` and `full`.
        mixers: token mixers of the blocks, repeated in this order: `memory` (the layer),
            `attention` (causal softmax attention), `window` (sliding-window attention) or
            `log_linear` (log-linear attention).
        attention_window: window of a `window` block, in tokens.
        rope_base: base of the rotary frequencies of `attention` and `window`.
        num_levels: number of levels of a `log_linear` block, for at most `2 ** (num_levels - 1)`
            tokens.
        num_kv_heads: number of heads of keys and values of `attention` and `window`; None = all.
        scan_layers: run the repetitions of `mixers` in one compiled loop (JAX only), which compiles
            faster and limits temporary memory; None = if there are at least `SCANNED`. Weights and
            checkpoints do not depend on it.
    """

    vocab_size: int
    num_layers: int
    layer: MCConfig
    ffn_width: int | None = None
    tie_embeddings: bool = True
    remat: str | bool = "none"
    mixers: tuple[str, ...] = ("memory",)
    attention_window: int = 256
    rope_base: float = 10000.0
    num_levels: int = 16
    num_kv_heads: int | None = None
    scan_layers: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        check_choice(self, "remat", REMATS)
        for field in ("vocab_size", "num_layers", "attention_window"):
            check_range(self, field, 1)
        check_range(self, "ffn_width", 0)
        check_range(self, "rope_base", 1.0)
        check_range(self, "num_levels", 1, MAX_LEVELS)
        are_known = all(mixer in MIXERS for mixer in self.mixers)
        if not are_known or not 1 <= len(self.mixers) <= self.num_layers:
            names = ", ".join(map(repr, MIXERS))
            allowed = f"a list of 1 to num_layers = {self.num_layers} names out of {names}"
            raise_config_error("ModelConfig", "mixers", list(self.mixers), allowed)
        try:
            _ = self.block_layers
        except ConfigError as error:  # a width or number of heads that is invalid for attention
            where = "" if error.problem.startswith("num_kv_heads") else "layer."
            raise ConfigError("ModelConfig", where + error.problem) from error

    @property
    def name(self) -> str:
        """Names of the mixers; for a memory, its kind and aggregation."""
        return ", ".join(MIXERS[mixer].label(self) or mixer for mixer in self.mixers)

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU, 0 without one."""
        return -(-8 * self.layer.d_model // 24) * 8 if self.ffn_width is None else self.ffn_width

    @property
    def scans_layers(self) -> bool:
        """True if the repetitions of `mixers` run in one compiled loop."""
        if self.scan_layers is None:
            return self.num_layers // len(self.mixers) >= SCANNED
        return self.scan_layers

    @property
    def block_layers(self) -> tuple[LayerConfig, ...]:
        """The configuration of each block's mixer."""
        configs = {mixer: MIXERS[mixer].configure(self) for mixer in self.mixers}
        return tuple(configs[self.mixers[i % len(self.mixers)]] for i in range(self.num_layers))


class MixerKind(NamedTuple):
    """A token mixer of a model's blocks."""

    description: str
    configure: Callable[[ModelConfig], LayerConfig]  # returns the layer's config
    label: Callable[[ModelConfig], str] = lambda model: ""  # "" = the mixer's name


def _attention_config(model: ModelConfig, window: int | None) -> AttentionConfig:
    layer = model.layer
    return AttentionConfig(
        layer.d_model,
        layer.num_heads,
        window=window,
        rope_base=model.rope_base,
        conv_width=layer.conv_width,
        output_norm=layer.output_norm,
        num_kv_heads=model.num_kv_heads,
    )


def _log_linear_config(model: ModelConfig) -> LogLinearConfig:
    layer = model.layer
    return LogLinearConfig(
        layer.d_model,
        layer.num_heads,
        num_levels=model.num_levels,
        chunk_size=1 << (layer.chunk_size.bit_length() - 1),
        qk_norm=layer.qk_norm or "l2",
        conv_width=layer.conv_width,
        output_norm=layer.output_norm,
    )


MIXERS: dict[str, MixerKind] = {
    "memory": MixerKind(
        "model.layer: a memory and its cached states",
        lambda model: model.layer,
        lambda model: f"{model.layer.memory.kind} + {model.layer.aggregation}",
    ),
    "attention": MixerKind(
        "causal softmax attention with rotary positions and the heads of model.layer",
        lambda model: _attention_config(model, None),
    ),
    "window": MixerKind(
        "causal softmax attention over the last model.attention_window tokens",
        lambda model: _attention_config(model, model.attention_window),
    ),
    "log_linear": MixerKind(
        "log-linear attention: linear attention with a state and a learned weight per level",
        _log_linear_config,
    ),
}
