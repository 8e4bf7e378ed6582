"""Checks of configuration values and arguments, with one-line error messages."""

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from operator import index
from typing import Any

import numpy as np


class ConfigError(ValueError):
    """A value that a configuration does not allow.

    Attributes:
        owner: name of the configuration's class.
        problem: the field, its value and what is allowed.
    """

    def __init__(self, owner: str, problem: str) -> None:
        super().__init__(owner, problem)
        self.owner, self.problem = owner, problem

    def __str__(self) -> str:
        """Return the message."""
        return f"{self.owner}.{self.problem}"


def raise_config_error(owner: str, field: str, value: object, allowed: str) -> typing.NoReturn:
    """Raise the `ValueError` of an invalid configuration field."""
    raise ConfigError(owner, f"{field} = {value!r}: must be {allowed}")


def check_types(config: Any) -> None:
    """Check the types of a dataclass's fields. An int is accepted as a float.

    Raises:
        ValueError: a field has a wrong type, or is a float that is not finite.
    """
    owner = type(config).__name__
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if allowed := allowed_type(value, hints[field.name]):
            raise_config_error(owner, field.name, value, allowed)


def allowed_type(value: object, hint: Any) -> str | None:
    """Return what a value of this type hint must be, or None where it is that."""
    options = hint_options(hint)
    if not any(_is(value, option) for option in options):
        return f"of type {' or '.join(map(_name, options))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    return None


def hint_options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; of another type hint, itself."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _is(value: object, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        item, _ = typing.get_args(kind)
        return isinstance(value, tuple) and all(_is(x, item) for x in value)
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"tuple of {typing.get_args(kind)[0].__name__}"
    return "None" if kind is type(None) else kind.__name__


def check_choice(config: Any, field: str, choices: Collection[str]) -> None:
    """Check that a field is one of a set of names."""
    value = getattr(config, field)
    if value not in choices:
        raise_config_error(
            type(config).__name__, field, value, "one of " + ", ".join(map(repr, choices))
        )


def check_range(
    config: Any,
    field: str,
    low: float | None = None,
    high: float | None = None,
    *,
    open_low: bool = False,
    open_high: bool = False,
    reason: str = "",
) -> None:
    """Check that a field is in an interval, which is closed by default.

    `reason` is appended to what is allowed.
    """
    value = getattr(config, field)
    if value is None:
        return
    below = low is not None and (value <= low if open_low else value < low)
    above = high is not None and (value >= high if open_high else value > high)
    if below or above:
        if low is None or high is None:
            sign = (">" if open_low else ">=") if low is not None else ("<" if open_high else "<=")
            allowed = f"{sign} {low if low is not None else high}"
        else:
            allowed = f"in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
        raise_config_error(type(config).__name__, field, value, allowed + reason)


def check_bool(name: str, x: Any, shape: Collection[int]) -> None:
    """Check that an array is None, or is bool and has the given shape.

    Integers are rejected because `~` is not their logical negation.

    Raises:
        ValueError: shape or dtype differ; the message states the actual and the expected ones.
    """
    if x is None:
        return
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype != "bool" or tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and dtype {dtype}: must be {tuple(shape)} and bool"
        )


def check_integers(name: str, dtype: str) -> None:
    """Check that the dtype of ids or indices is an integer dtype, which excludes bool.

    Raises:
        ValueError: the dtype is not an integer dtype.
    """
    if not dtype.startswith(("int", "uint")):
        raise ValueError(f"{name} has dtype {dtype}: must be an integer dtype")


def check_ids(name: str, ids: np.ndarray, size: int, mask: np.ndarray | None = None) -> None:
    """Check that ids or indices are in `0..size - 1`.

    Args:
        name: name of the argument.
        ids: integers, any shape.
        size: number of ids.
        mask: bool, same shape as `ids`, False at ids to ignore; None = check all.

    Raises:
        ValueError: an id is out of range; the message states the first one and its position.
    """
    if not ids.size or (ids.min() >= 0 and ids.max() < size):
        return
    out_of_range = (ids < 0) | (ids >= size)
    if mask is not None:
        out_of_range &= mask
    for position in np.argwhere(out_of_range)[:1].tolist():
        allowed = f"in 0..{size - 1}" if size else "none"
        value = ids[tuple(position)]
        raise ValueError(f"{name}[{', '.join(map(str, position))}] = {value}: must be {allowed}")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Check that an argument is an integer from `low` to `high`; None = no upper bound.

    Raises:
        ValueError: an argument is invalid; the message states its value and the allowed values.
    """
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"{name} = {value!r}: must be an integer") from error
    if isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}: must be an integer")
    if number < low or (high is not None and number > high):
        allowed = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} = {value}: must be {allowed}")


def check_static(name: str, size: object, static: bool) -> None:
    """Reject symbolic sizes, which `torch.export` and `jax.export` use for dynamic dimensions.

    Args:
        name: name of the size.
        size: its value, for the error message.
        static: True if it is a number.

    Raises:
        ValueError: the size is symbolic.
    """
    if not static:
        raise ValueError(
            f"{name} = {size}: must be static, because segments and chunks depend on it: export "
            "one program per length"
        )


def check_keys(
    owner: str, data: object, allowed: Collection[str], required: Collection[str]
) -> None:
    """Refuse unknown and missing keys of a mapping; `owner` = "" for the root of a file."""
    if not isinstance(data, dict):
        raise ValueError(f"{owner or 'file'} = {data!r}: must be a mapping")
    start = f"{owner}: " if owner else ""
    for key in data:
        if key not in allowed:
            raise ValueError(f"{start}unknown key {key!r}; allowed are {', '.join(allowed)}")
    for key in required:
        if key not in data:
            raise ValueError(f"{start}key {key!r} is missing")
