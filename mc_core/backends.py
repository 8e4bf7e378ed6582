"""Registry of a framework's memory backends, by memory kind."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def add_backend(backends: dict[str, type[T]], kind: str, cls: type[T], base: type[T]) -> None:
    """Register a class. A reloaded class replaces its previous version.

    Args:
        backends: the registry.
        kind: the memory kind.
        cls: the backend's class.
        base: base class of all backends.

    Raises:
        ValueError: the class is not a subclass of `base`, or the kind is already registered.
    """
    if not issubclass(cls, base):
        raise ValueError(f"register_backend: {cls.__name__} must be a subclass of {base.__name__}")
    known = backends.get(kind, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"register_backend: kind = {kind!r} is already registered by {known.__name__}"
        )
    backends[kind] = cls


def find_backend(backends: Mapping[str, type[T]], kind: str, package: str) -> type[T]:
    """Return the backend of a memory kind.

    Args:
        backends: the registry.
        kind: the memory kind.
        package: name of the framework's package, for the error message.

    Raises:
        ValueError: the kind has no backend.
    """
    if kind not in backends:
        raise ValueError(
            f"memory.kind = {kind!r}: {package} has no backend for this kind: must be one of "
            f"{', '.join(map(repr, backends))}, or registered with {package}.register_backend"
        )
    return backends[kind]
