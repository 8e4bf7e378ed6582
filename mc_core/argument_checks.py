"""Checks of arguments by shape and dtype, for arrays of any framework."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mc_core.checks import check_bool, check_static
from mc_core.config import MCConfig
from mc_core.memories import MemoryConfig

METHODS = ("chunked", "recurrent")


def check_arguments(
    tensors: Mapping[str, Any],
    initial: Sequence[Any],
    coefficients: Any,
    config: MCConfig,
    norm: Sequence[Any] | None,
    mask: Any,
    is_static: Callable[[Any], bool],
    *,
    gate_bias: Any = None,
) -> None:
    """Check the arguments of `memory_caching` and `extend` against each other.

    Args:
        tensors: q, k, u [b, t, h, k] and v [b, t, h, v] by name; u may be None.
        initial: weights W_0 per layer.
        coefficients: NamedTuple of write coefficients, each [b, t, h] or None.
        config: the layer's configuration.
        norm: (gain, bias), or None.
        mask: bool [b, t], or None.
        is_static: function that returns True if a size is a number, not a symbol of a program.
        gate_bias: biases [h] of the online memory's score, or None.

    Raises:
        ValueError: an argument is invalid; the message states its value and what is expected.
    """
    q, v, u = tensors["q"], tensors["v"], tensors["u"]
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, v {tuple(v.shape)}: must be [b, t, h, k] and "
            "[b, t, h, v]"
        )
    b, t, h, width = q.shape
    check_static("tokens", t, is_static(t))
    if u is None and config.projects_u:
        raise ValueError(f"u = None: must be given for aggregation = {config.aggregation!r}")
    if gate_bias is None and config.has_gate_bias:
        raise ValueError(
            f"gate_bias = None: must be given for config.gate_bias = {config.gate_bias}"
        )
    check_bool("mask", mask, (b, t))
    named = coefficients._asdict()
    _check_presence(named, config.memory, norm)
    shapes = {"k": (tensors["k"], q.shape), "v": (v, (b, t, h, v.shape[-1]))}
    if u is not None:
        shapes["u"] = (u, q.shape)
    if gate_bias is not None:
        shapes["gate_bias"] = (gate_bias, (h,))
    for name, value in named.items():
        if value is not None:
            shapes[f"coefficients.{name}"] = (value, (b, t, h))
    shapes |= _initial_shapes(initial, config.memory, h, width, v.shape[-1])
    shapes |= {f"norm[{i}]": (x, (h, v.shape[-1])) for i, x in enumerate(norm or ())}
    if config.memory.adds_input and width != v.shape[-1]:
        raise ValueError(
            f"v has width {v.shape[-1]}: must be {width}, the width of k, for a memory with a "
            "residual connection"
        )
    for name, (value, shape) in shapes.items():
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: must be {tuple(shape)}")


def check_inputs(x: Any, mask: Any, d_model: int, is_static: Callable[[Any], bool]) -> None:
    """Check the inputs of a mixer.

    Args:
        x: [b, t, d].
        mask: bool [b, t], or None.
        d_model: d.
        is_static: function that returns True if a size is a number, not a symbol of a program.

    Raises:
        ValueError: an argument is invalid; the message states its value and what is expected.
    """
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x has shape {tuple(x.shape)}: must be [b, t, {d_model}]")
    check_static("tokens", x.shape[1], is_static(x.shape[1]))
    check_bool("mask", mask, x.shape[:2])


def check_tokens(tokens: Any, mask: Any, padding: Any, is_static: Callable[[Any], bool]) -> Any:
    """Check the shapes of a model's inputs.

    Args:
        tokens: ids [b, t].
        mask: bool [b, t], False at masked tokens, or None.
        padding: bool [b, t], True at padding, or None.
        is_static: function that returns True if a size is a number, not a symbol of a program.

    Returns:
        bool [b, t], False at masked tokens and padding, or None.

    Raises:
        ValueError: an argument is invalid; the message states its value and what is expected.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be [b, t]")
    check_static("tokens", tokens.shape[1], is_static(tokens.shape[1]))
    check_bool("mask", mask, tokens.shape)
    check_bool("padding", padding, tokens.shape)
    if padding is None:
        return mask
    return ~padding if mask is None else mask & ~padding


def check_method(method: str, inspect: bool) -> None:
    """Check the arguments `method` and `inspect` of `memory_caching`.

    Raises:
        ValueError: an argument is invalid; the message states the allowed values.
    """
    if method not in METHODS:
        raise ValueError(f"method = {method!r}: must be one of 'chunked', 'recurrent'")
    if inspect and method != "chunked":
        raise ValueError(f"inspect = True: method = {method!r} must be 'chunked'")


def _check_presence(
    coefficients: Mapping[str, Any], memory: MemoryConfig, norm: Sequence[Any] | None
) -> None:
    for name, value in coefficients.items():
        if (value is not None) != (name in memory.coefficient_fields):
            state = "missing" if value is None else "given"
            names = sorted(memory.coefficient_fields)
            raise ValueError(f"coefficients.{name} is {state}: {memory.kind!r} takes {names}")
    if (norm is not None) != memory.has_layer_norm:
        expected = "(gain, bias)" if memory.has_layer_norm else "None"
        state = "None" if norm is None else "given"
        raise ValueError(f"norm is {state}: must be {expected} for memory = {memory}")


def _initial_shapes(
    initial: Sequence[Any], memory: MemoryConfig, heads: int, key: int, value: int
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    depth = len(memory.widths(key, value)) - 1
    if len(initial) != depth:
        raise ValueError(f"initial has {len(initial)} weights: must be {depth}")
    # Hidden widths are read from the weights: only their consistency is checked.
    dims = [key, *(weight.shape[-2] for weight in initial[:-1]), value]
    return {
        f"initial[{layer}]": (weight, (heads, dims[layer + 1], dims[layer]))
        for layer, weight in enumerate(initial)
    }
