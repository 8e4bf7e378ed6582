"""Names of parameters in files, without what other software puts before and into them."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, TypeVar

from mc_core.weights import in_table

T = TypeVar("T")

# Of torch.compile, (Distributed)DataParallel, activation checkpointing, FSDP and Lightning Fabric.
WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_checkpoint_wrapped_module",
        "_fsdp_wrapped_module",
        "_forward_module",
    }
)
COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel, which is no parameter
# Where training loops keep a state_dict among other things.
PLACES = ("state_dict", "model_state_dict", "model", "module")

_log = logging.getLogger("mc_core")


def plain_names(
    names: Iterable[str], known: Callable[[str], bool] = in_table
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return every name without wrappers, and without a prefix that all names share.

    A wrapper is removed only where everything at its place in the tree of modules is inside of it,
    another prefix only where all names that remain are known. So no two names become one.

    Args:
        names: keys of a `state_dict`.
        known: whether a name is that of a parameter.

    Returns:
        The plain name of each, and what was removed, in the order of first appearance.
    """
    parts = {name: tuple(name.split(".")) for name in names}
    children: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in parts.values():
        for i, part in enumerate(path):
            children[path[:i]].add(part)
    removed: dict[str, None] = {}
    kept: dict[str, list[str]] = {}
    for name, path in parts.items():
        wraps = [
            part in WRAPPERS and len(children[path[:i]]) == 1 for i, part in enumerate(path[:-1])
        ]
        removed |= dict.fromkeys(part for part, wrap in zip(path, wraps, strict=False) if wrap)
        kept[name] = [part for part, wrap in zip(path, (*wraps, False), strict=True) if not wrap]
    length = _prefix(list(kept.values()), known)
    if length:
        removed[".".join(next(iter(kept.values()))[:length])] = None
    return {name: ".".join(path[length:]) for name, path in kept.items()}, tuple(removed)


def strip_prefixes(
    flat: Mapping[str, T],
    path: str | PathLike[str],
    known: Callable[[str], bool] = in_table,
) -> dict[str, T]:
    """Return parameters under their plain names; log one line that says what was removed.

    Args:
        flat: a file's `state_dict`.
        path: of the file, for the line.
        known: as `plain_names` takes it.
    """
    averaged = COUNTER in flat and all(
        name == COUNTER or name.startswith("module.") for name in flat
    )
    flat = {name: value for name, value in flat.items() if not (averaged and name == COUNTER)}
    plain, removed = plain_names(flat, known)
    if removed:
        words = ", ".join(f"'{part}.'" for part in removed)
        _log.warning("%s: removed %s from the names of parameters", path, words)
    return {plain[name]: value for name, value in flat.items()}


def find_state_dict(
    loaded: Any, path: str | PathLike[str], is_array: Callable[[Any], bool]
) -> Mapping[str, Any]:
    """Return the parameters in a file's content; log one line that says where, unless at the top.

    Args:
        loaded: a `state_dict`, or a training loop's checkpoint with one in it.
        path: of the file, for the line.
        is_array: whether a value is an array of the framework.

    Raises:
        ValueError: there are none, or several.
    """

    def is_state(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(map(is_array, value.values()))

    if is_state(loaded):
        return loaded
    found = [key for key in PLACES if isinstance(loaded, Mapping) and is_state(loaded.get(key))]
    if len(found) > 1:
        raise ValueError(
            f"holds several state_dicts, under {', '.join(map(repr, found))}: keep one"
        )
    if not found:
        places = ", ".join(map(repr, PLACES))
        raise ValueError(f"holds no state_dict: must be one, or have one under one of {places}")
    _log.warning("%s: read the parameters under %r, and nothing else", path, found[0])
    return loaded[found[0]]


def _prefix(paths: list[list[str]], known: Callable[[str], bool]) -> int:
    """Return how many parts to remove from the front of all, so that all are known; else 0."""
    shortest = min(map(len, paths), default=0)
    for length in range(shortest):
        if len({tuple(path[:length]) for path in paths}) > 1:
            return 0
        if all(known(".".join(path[length:])) for path in paths):
            return length
    return 0
