"""Conversion of configuration dataclasses to and from plain values, checked by type hints.

Supported hints: int, float, str, bool, Path, Any, `X | None`, `float | str`, `tuple[X, ...]`,
`tuple[X, Y]`, `dict[str, X]`, dataclasses, dataclasses with a `Tag`, and `str | dataclass`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self, TypeVar, get_args, get_type_hints

from mc_core.checks import ConfigError, allowed_type, check_keys, hint_options

C = TypeVar("C")


class Tag(NamedTuple):
    """Discriminator of a union of dataclasses: the key that selects the class.

    Each class has the class attribute `tag`, and its own name as the class attribute `key`. If the
    key is missing, the first class of the union is used.
    """

    key: str
    classes: Mapping[str, type]  # by name
    omitted: str | None = None  # the name that `to_dict` omits


class Serializable:
    """Mixin with the methods `to_dict` and `from_dict` of a dataclass."""

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of plain values; those of memories include `kind`."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build an instance from the output of `to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        return from_dict(cls, data, cls.__name__)


def to_dict(config: Any) -> dict[str, Any]:
    """Return the tag and the fields of a dataclass as plain values."""
    tag: Tag | None = getattr(config, "tag", None)
    name = getattr(config, tag.key) if tag else None
    out = {} if tag is None or name == tag.omitted else {tag.key: name}
    fields = dataclasses.fields(config)
    return out | {field.name: _to_plain(getattr(config, field.name)) for field in fields}


def non_defaults(config: Any) -> dict[str, Any]:
    """Return `to_dict` without the fields that are equal to their defaults, at every level.

    A new field does not change the result for configurations that do not use it.
    """
    out = to_dict(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or (
            field.default_factory is not dataclasses.MISSING and value == field.default_factory()
        ):
            del out[field.name]
        elif dataclasses.is_dataclass(value):
            out[field.name] = non_defaults(value)
    return out


def _to_plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def from_dict(cls: type[C], data: Any, path: str = "") -> C:
    """Build a dataclass from the output of `to_dict`.

    Args:
        cls: the dataclass, or the base class of tagged ones.
        data: plain values.
        path: path of `data` in error messages; "" for the root.

    Raises:
        ValueError: a key is unknown or missing, or a value is not allowed; includes the path.
    """
    return _build((cls,), data, path)


def _build(options: tuple[type, ...], data: Any, path: str) -> Any:
    cls, data = _select(options, data, path)
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    check_keys(path, data, [field.name for field in fields], required)
    hints = get_type_hints(cls)
    values = {key: _load(hints[key], value, _join(path, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        if isinstance(error, ConfigError) and error.owner == cls.__name__:
            raise ValueError(_join(path, error.problem)) from error
        raise ValueError(f"{path}: {error}" if path else str(error)) from error


def _select(options: tuple[type, ...], data: Any, path: str) -> tuple[type, Any]:
    """Return the dataclass selected by the tag of `data`, and `data` without the tag."""
    tag: Tag | None = getattr(options[0], "tag", None)
    if tag is None or not isinstance(data, dict):
        return options[0], data
    first = getattr(options[0], tag.key, None)  # None for a base class
    classes = {name: cls for name, cls in tag.classes.items() if issubclass(cls, options)}
    classes |= {first: options[0]} if first else {}
    name = data.get(tag.key, first)
    if name not in list(classes):
        allowed = ("one of " if len(classes) > 1 else "") + ", ".join(map(repr, classes))
        _refuse(_join(path, tag.key), name, allowed)
    return classes[name], {key: value for key, value in data.items() if key != tag.key}


def _load(hint: Any, value: Any, path: str) -> Any:
    options = hint_options(hint)
    if value is None and type(None) in options:
        return None
    if isinstance(value, dict):  # of `str | dataclass`
        options = tuple(x for x in options if dataclasses.is_dataclass(x)) or options
    option, items = options[0], get_args(options[0])
    if dataclasses.is_dataclass(option):
        return _build(tuple(x for x in options if x is not type(None)), value, path)
    kind = getattr(option, "__origin__", option)
    if kind is tuple:
        return _load_tuple(items, value, path)
    if kind is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            _refuse(path, value, "a mapping with text keys")
        return {key: _load(items[1], item, _join(path, key)) for key, item in value.items()}
    if option is Path and isinstance(value, str):
        return Path(value)
    if allowed := "the path of a file" if option is Path else allowed_type(value, hint):
        _refuse(path, value, allowed)
    return float(value) if option is float and not isinstance(value, str) else value


def _load_tuple(items: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    of_text = hint_options(items[0])[0] is str
    if isinstance(value, str) and of_text:
        value = [value]
    many = items[-1] is ...
    if not isinstance(value, list) or not (many or len(value) == len(items)):
        a_list = "a list" if many else f"a list of {len(items)} values"
        _refuse(path, value, "text or a list of text" if of_text else a_list)
    hints = items[:1] * len(value) if many else items
    pairs = zip(hints, value, strict=True)
    return tuple(_load(hint, item, f"{path}[{i}]") for i, (hint, item) in enumerate(pairs))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _refuse(path: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{path} = {value!r}: must be {allowed}")
