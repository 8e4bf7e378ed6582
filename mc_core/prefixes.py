"""Removal of the prefixes that wrappers add to parameter names in files."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, TypeVar

from mc_core.weights import in_table

T = TypeVar("T")

# Added by torch.compile, (Distributed)DataParallel, activation checkpointing, FSDP and Lightning
# Fabric.
WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_forward_module",
    }
)
AVERAGE_COUNTER = "n_averaged"  # buffer of torch.optim.swa_utils.AveragedModel, not a parameter
# Keys under which training loops store a state_dict in a checkpoint.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")

_log = logging.getLogger("mc_core")


def plain_names(
    names: Iterable[str], known: Callable[[str], bool] = in_table
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Remove the names of wrappers, and a prefix shared by all names.

    A wrapper is removed only if it is the only child of its parent module. A shared prefix is
    removed only if all remaining names are known. Names therefore remain distinct.

    Args:
        names: keys of a `state_dict`.
        known: function that returns True for the name of a parameter.

    Returns:
        The plain name of each name, and the removed prefixes in order of first appearance.
    """
    parts = {name: tuple(name.split(".")) for name in names}
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in parts.values():
        for i, part in enumerate(path):
            children[path[:i]].add(part)
    removed: dict[str, None] = {}
    remaining: dict[str, list[str]] = {}
    for name, path in parts.items():
        wraps = [
            part in WRAPPERS and len(children[path[:i]]) == 1 for i, part in enumerate(path[:-1])
        ]
        removed |= dict.fromkeys(part for part, wrap in zip(path, wraps, strict=False) if wrap)
        remaining[name] = [
            part for part, wrap in zip(path, (*wraps, False), strict=True) if not wrap
        ]
    length = _prefix(list(remaining.values()), known)
    if length:
        removed[".".join(next(iter(remaining.values()))[:length])] = None
    return {name: ".".join(path[length:]) for name, path in remaining.items()}, tuple(removed)


def strip_prefixes(
    flat: Mapping[str, T],
    path: str | PathLike[str],
    known: Callable[[str], bool] = in_table,
) -> dict[str, T]:
    """Return parameters by their names without prefixes; log the removed prefixes.

    Args:
        flat: `state_dict` of a file.
        path: path of the file, for log messages.
        known: as in `plain_names`.
    """
    averaged = AVERAGE_COUNTER in flat and all(
        name == AVERAGE_COUNTER or name.startswith("module.") for name in flat
    )
    flat = {
        name: value for name, value in flat.items() if not (averaged and name == AVERAGE_COUNTER)
    }
    plain, removed = plain_names(flat, known)
    if removed:
        words = ", ".join(f"'{part}.'" for part in removed)
        _log.warning("%s: removed %s from the names of parameters", path, words)
    return {plain[name]: value for name, value in flat.items()}


def find_state_dict(
    loaded: Any, path: str | PathLike[str], is_array: Callable[[Any], bool]
) -> Mapping[str, Any]:
    """Return the `state_dict` in the content of a file; log its key if it is nested.

    Args:
        loaded: a `state_dict`, or a checkpoint that contains one.
        path: path of the file, for log messages.
        is_array: function that returns True for an array of the framework.

    Raises:
        ValueError: there is no `state_dict`, or more than one.
    """

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(is_array, value.values()))

    if is_state(loaded):
        return loaded
    keys = [
        key for key in STATE_DICT_KEYS if isinstance(loaded, Mapping) and is_state(loaded.get(key))
    ]
    if len(keys) > 1:
        found = ", ".join(map(repr, keys))
        raise ValueError(f"contains several state_dicts, under {found}: must contain one")
    if not keys:
        allowed = ", ".join(map(repr, STATE_DICT_KEYS))
        raise ValueError(
            f"contains no state_dict: must have one at the top level or under {allowed}"
        )
    _log.warning("%s: read only the parameters under %r", path, keys[0])
    return loaded[keys[0]]


def _prefix(paths: list[list[str]], known: Callable[[str], bool]) -> int:
    """Return the number of leading parts that make all names known if removed, else 0."""
    shortest = min(map(len, paths), default=0)
    for length in range(shortest):
        if len({tuple(path[:length]) for path in paths}) > 1:
            return 0
        if all(known(".".join(path[length:])) for path in paths):
            return length
    return 0
