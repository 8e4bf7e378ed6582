"""Configurations of runs from plain values and back, strictly."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, get_origin

import cattrs
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError

from mc_core import ModelConfig
from mc_core.checks import raise_config_error
from mc_core.memories import MEMORIES
from train.config.recall_schema import Length
from train.config.schema import TASKS, DataConfig, TextConfig, TrainConfig

SECTIONS = {
    "TrainConfig": "",
    **{task.__name__: "data" for task in TASKS.values()},
    "OptimizerConfig": "optimizer",
    "RunConfig": "run",
    "ModelConfig": "model",
    "MCConfig": "model.layer",
    "AttentionConfig": "model.layer",
    **{memory.__name__: "model.layer.memory" for memory in MEMORIES.values()},
}


def from_dict(data: Any) -> TrainConfig:
    """Build from `to_dict`'s form, strictly.

    Raises:
        ValueError: one line with the key's path, its value and what is allowed.
    """
    try:
        return _converter().structure(data, TrainConfig)
    except ClassValidationError as error:
        raise ValueError(_message(error)) from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return plain values."""
    return _converter().unstructure(config)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _structure_plain)
    converter.register_structure_hook_func(lambda t: t == tuple[str, ...], _structure_words)
    converter.register_structure_hook_func(_is_lengths, _structure_lengths)
    converter.register_structure_hook_func(lambda t: t == DataConfig, _structure_task(converter))
    converter.register_unstructure_hook_func(
        lambda t: t == DataConfig, _unstructure_task(converter)
    )
    converter.register_structure_hook(ModelConfig, lambda data, _: ModelConfig.from_dict(data))
    converter.register_unstructure_hook(ModelConfig, ModelConfig.to_dict)
    converter.register_unstructure_hook_func(lambda t: get_origin(t) is tuple, _to_list)
    for kind in (int, float, str):
        converter.register_structure_hook(kind | None, _structure_optional)
    return converter


def _structure_task(converter: cattrs.Converter) -> Callable[[Any, Any], DataConfig]:
    def structure(data: Any, _: Any) -> DataConfig:
        if not isinstance(data, dict):
            raise ValueError("must be a mapping of keys")
        task = data.get("task", TextConfig.task)
        if not isinstance(task, str) or task not in TASKS:
            raise_config_error("TextConfig", "task", task, "one of " + ", ".join(map(repr, TASKS)))
        rest = {key: value for key, value in data.items() if key != "task"}
        return converter.structure(rest, TASKS[task])

    return structure


def _unstructure_task(converter: cattrs.Converter) -> Callable[[DataConfig], dict[str, Any]]:
    def unstructure(data: DataConfig) -> dict[str, Any]:
        # Text goes without saying: so it stands in the checkpoints of runs that knew no other task.
        tag = {} if isinstance(data, TextConfig) else {"task": data.task}
        return tag | converter.unstructure(data, type(data))

    return unstructure


def _to_list(value: Any) -> Any:
    return [_to_list(item) for item in value] if isinstance(value, tuple) else value


def _structure_plain(value: object, kind: type) -> Any:
    wrong = isinstance(value, bool) != (kind is bool) or not isinstance(
        value, (int, float) if kind is float else kind
    )
    if wrong:
        raise ValueError(f"= {value!r}: must be of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"= {value!r}: must be finite")
    return kind(value)


def _structure_optional(value: object, union: Any) -> Any:
    return None if value is None else _structure_plain(value, union.__args__[0])


def _structure_words(value: object, _: type) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"= {value!r}: must be a path, the word stdlib, or a list of them")
    return tuple(words)


def _is_lengths(kind: Any) -> bool:
    return kind in (tuple[int, ...], tuple[Length, ...])


def _structure_lengths(value: object, kind: Any) -> tuple[Any, ...]:
    def whole(item: object) -> bool:
        return isinstance(item, int) and not isinstance(item, bool)

    def pair(item: object) -> bool:
        return isinstance(item, list) and len(item) == 2 and all(map(whole, item))

    pairs = kind == tuple[Length, ...]
    if not isinstance(value, list) or not all(map(pair if pairs else whole, value)):
        what = "[tokens, pairs], each a list of two integers" if pairs else "numbers of tokens"
        raise ValueError(f"= {value!r}: must be a list of {what}")
    return tuple(tuple(item) if pairs else item for item in value)


def _message(error: ClassValidationError) -> str:
    """Return the first fault of a tree of them as `key.path = value: must be ...`."""
    where = ""
    cause: BaseException = error
    while isinstance(cause, ClassValidationError):
        fault = cause.exceptions[0]
        names = [n.name for n in getattr(fault, "__notes__", []) if hasattr(n, "name")]
        where, cause = ".".join(filter(None, [where, *names])), fault
    if isinstance(cause, ForbiddenExtraKeysError):
        allowed = ", ".join(f.name for f in dataclasses.fields(cause.cl))
        key = min(cause.extra_fields, key=str)
        return f"{where + ': ' if where else ''}unknown key {key!r}; allowed are {allowed}"
    if isinstance(cause, KeyError):
        return f"{where}: key is missing"
    text = str(cause)
    if text.startswith("= "):
        return f"{where} {text}"
    owner = re.match(r"\w+", text)
    if owner and owner[0] in SECTIONS:
        return f"{SECTIONS[owner[0]]}{text[owner.end() :]}".lstrip(".: ")
    return f"{where} must be a mapping of keys" if where else text
