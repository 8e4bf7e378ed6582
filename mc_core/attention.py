"""Configuration of softmax attention."""

from dataclasses import dataclass

from mc_core.checks import check_choice, check_range, check_types, raise_config_error
from mc_core.serialization import Serializable

OUTPUT_NORMS = ("rms", "none")


@dataclass(frozen=True)
class AttentionConfig(Serializable):
    """One layer of causal softmax attention with rotary positions (RoPE, arXiv:2104.09864).

    Attributes:
        d_model: model width d, a multiple of `2 * num_heads`.
        num_heads: number of heads h; the key and value width is d / h.
        window: number of most recent tokens, including the current one, that a token attends to;
            None = all.
        rope_base: base of the rotary frequencies; pair i rotates by `rope_base ** (-2i / k)` per
            token.
        conv_width: width of the causal depthwise convolution before q, k and v; 0 for none.
        output_norm: RMS norm of each head's read (`rms`), or `none`.
        num_kv_heads: number of heads of keys and values, a divisor of `num_heads`: consecutive
            heads share one (grouped-query attention, arXiv:2305.13245); None = `num_heads`.

    Raises:
        ValueError: a field is invalid; the message states its value and the allowed values.
    """

    d_model: int
    num_heads: int
    window: int | None = None
    rope_base: float = 10000.0
    conv_width: int = 0
    output_norm: str = "rms"
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("d_model", "num_heads", "window", "num_kv_heads"):
            check_range(self, field, 1)
        check_range(self, "rope_base", 1.0)
        check_range(self, "conv_width", 0)
        check_choice(self, "output_norm", OUTPUT_NORMS)
        if self.num_heads % self.kv_heads:
            allowed = f"a divisor of num_heads = {self.num_heads}"
            raise_config_error("AttentionConfig", "num_kv_heads", self.num_kv_heads, allowed)
        if self.d_model % (2 * self.num_heads):
            allowed = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise_config_error("AttentionConfig", "d_model", self.d_model, allowed)

    @property
    def head_dim(self) -> int:
        """Key and value width of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def slots(self, tokens: int) -> int:
        """Return the number of keys and values that a stream of `tokens` tokens stores."""
        return tokens if self.window is None else min(self.window, tokens)
