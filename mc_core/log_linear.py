"""Configuration of log-linear attention, and its levels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mc_core.checks import (
    check_bool,
    check_choice,
    check_range,
    check_static,
    check_types,
    raise_config_error,
)
from mc_core.memory_kinds import LinearConfig
from mc_core.serialization import Serializable

METHODS = ("chunked", "recurrent", "dense")
MAX_LEVELS = 31  # positions of 2**30 and more mark invalidated streams


@dataclass(frozen=True)
class LogLinearConfig(Serializable):
    """One layer of log-linear attention (arXiv:2506.04761).

    Attributes:
        d_model: model width d, a multiple of `num_heads`.
        num_heads: number of heads h; the key and value width is d / h.
        num_levels: number of learned level weights per head. A sequence has at most
            `2 ** (num_levels - 1)` tokens: 32,768 by default.
        chunk_size: number of consecutive tokens that are computed densely, a power of two. It
            changes only the speed.
        retention: decay of the states per token: `token` (a learned linear map of the token) or
            `head` (learned, one per head), both through a sigmoid and close to 0.999 at first, or
            `constant`: 1, no decay.
        qk_norm: L2 norm of each head's q and k (`l2`), or `none`.
        conv_width: width of the causal depthwise convolution before q, k and v; 0 for none.
        output_norm: RMS norm of each head's read (`rms`), or `none`.

    Raises:
        ValueError: a field is invalid; the message states its value and the allowed values.
    """

    d_model: int
    num_heads: int
    num_levels: int = 16
    chunk_size: int = 64
    retention: str = "token"
    qk_norm: str = "l2"
    conv_width: int = 0
    output_norm: str = "rms"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("d_model", "num_heads", "chunk_size"):
            check_range(self, field, 1)
        check_range(self, "num_levels", 1, MAX_LEVELS)
        check_range(self, "conv_width", 0)
        check_choice(self, "retention", ("token", "head", "constant"))
        check_choice(self, "qk_norm", ("l2", "none"))
        check_choice(self, "output_norm", ("rms", "none"))
        if not is_power_of_two(self.chunk_size):
            raise_config_error("LogLinearConfig", "chunk_size", self.chunk_size, "a power of two")
        if self.d_model % self.num_heads:
            allowed = f"a multiple of num_heads = {self.num_heads}"
            raise_config_error("LogLinearConfig", "d_model", self.d_model, allowed)

    @property
    def head_dim(self) -> int:
        """Key and value width of a head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads

    @property
    def memory(self) -> LinearConfig:
        """The memory of each level, a decayed sum of outer products."""
        return LinearConfig(coefficients=self.retention)

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a sequence or stream."""
        return 2 ** (self.num_levels - 1)

    def slots(self, tokens: int) -> int:
        """Return the number of states of a stream of at most `tokens` tokens: one per level.

        Raises:
            ValueError: the configuration has fewer levels.
        """
        self.check_length("max_tokens", tokens)
        return level_count(tokens)

    def check_length(self, name: str, tokens: int) -> None:
        """Check that there are enough levels for a number of tokens.

        Raises:
            ValueError: there are fewer levels; the message states the name and the required number.
        """
        if tokens > self.max_tokens:
            raise ValueError(
                f"{name} = {tokens}: must be <= {self.max_tokens} = 2 ** (num_levels - 1), or use "
                f"num_levels >= {level_count(tokens)}"
            )


def is_power_of_two(number: int) -> bool:
    """Return True if a number >= 1 is a power of two."""
    return not number & (number - 1)


def level_count(tokens: int) -> int:
    """Return the number of levels of a sequence: `bit_length(tokens - 1) + 1`."""
    return max(tokens - 1, 0).bit_length() + 1


def pair_levels(tokens: int) -> np.ndarray:
    """Return the level `bit_length(t XOR s)` of all pairs of tokens, [t, s] (section 7)."""
    token = np.arange(tokens)
    return bit_length(token[:, None] ^ token)


def bit_length(x: np.ndarray) -> np.ndarray:
    """Return the number of bits of integers [...] from 0 to `2**30 - 1`."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int32)


def level_slices(tokens: int) -> list[tuple[int, slice]]:
    """Return the levels with tokens, as seen from the last token, and the tokens of each."""
    last = tokens - 1
    blocks = [(0, slice(last, tokens))]
    for i in range(last.bit_length()):
        if last >> i & 1:
            end = last >> i << i
            blocks.append((i + 1, slice(end - (1 << i), end)))
    return blocks


def mean_reads(chunks: int) -> float:
    """Return the average number of states of earlier chunks that a chunk reads."""
    return sum(chunk.bit_count() for chunk in range(chunks)) / chunks


def check_log_linear(
    tensors: Mapping[str, Any],
    mask: Any,
    method: str,
    chunk_size: int,
    is_static: Callable[[Any], bool],
) -> None:
    """Check the arguments of `log_linear_attention`.

    Args:
        tensors: q, k [b, t, h, k], v [b, t, h, v], level_weights [b, t, h, l] and retention
            [b, t, h], by name.
        mask: bool [b, t], or None.
        method: one of `METHODS`.
        chunk_size: tokens per chunk.
        is_static: function that returns True if a size is a number, not a symbol of a program.

    Raises:
        ValueError: an argument is invalid; the message states its value and what is expected.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of {', '.join(map(repr, METHODS))}")
    if chunk_size < 1 or not is_power_of_two(chunk_size):
        raise ValueError(f"chunk_size = {chunk_size}: must be a power of two")
    q, v, weights = tensors["q"], tensors["v"], tensors["level_weights"]
    if q.ndim != 4 or v.ndim != 4 or weights.ndim != 4:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes are {shapes}: q, v and level_weights must have 4 axes")
    b, t, h, _ = q.shape
    check_static("tokens", t, is_static(t))
    if t < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}: must have t >= 1")
    expected = {
        "k": q.shape,
        "v": (b, t, h, v.shape[-1]),
        "level_weights": (b, t, h, weights.shape[-1]),
        "retention": (b, t, h),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            actual = tuple(tensors[name].shape)
            raise ValueError(f"{name} has shape {actual}: must be {tuple(shape)}")
    check_bool("mask", mask, (b, t))
    if weights.shape[-1] < level_count(t):
        raise ValueError(
            f"level_weights has {weights.shape[-1]} levels: {t} tokens need >= {level_count(t)}"
        )
