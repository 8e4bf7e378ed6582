"""Conversion of nested tuples, lists and dictionaries to and from flat names."""

from collections.abc import Iterator, Mapping
from typing import Any


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield pairs of name and leaf, such as `("a.b.0.c", leaf)`. None has no leaves."""
    if tree is None:
        return
    if not isinstance(tree, dict | tuple | list):
        yield path, tree
        return
    for name, branch in _branches(tree):
        yield from flatten(branch, f"{path}.{name}" if path else str(name))


def unflatten(tree: Any, leaves: Mapping[str, Any], path: str = "") -> Any:
    """Return `tree` with its leaves replaced by those of the same name."""
    if tree is None:
        return None
    if not isinstance(tree, dict | tuple | list):
        return leaves[path]
    new = [
        unflatten(branch, leaves, f"{path}.{name}" if path else str(name))
        for name, branch in _branches(tree)
    ]
    if isinstance(tree, dict):
        return dict(zip(tree, new, strict=True))
    return type(tree)(*new) if hasattr(tree, "_fields") else type(tree)(new)


def _branches(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        return iter(tree.items())
    return zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
