"""The registry of a framework's memories, by the kind of their configuration."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def add_backend(backends: dict[str, type[T]], kind: str, cls: type[T], base: type[T]) -> None:
    """Register a class; the same one again, from a module that was loaded anew, takes its place.

    Args:
        backends: the registry.
        kind: of the configurations whose memory it is.
        cls: the class.
        base: of all memories.

    Raises:
        ValueError: the class is no subclass of `base`, or another class has the kind.
    """
    if not issubclass(cls, base):
        raise ValueError(f"register_backend: {cls.__name__} must be a subclass of {base.__name__}")
    known = backends.get(kind, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"register_backend: kind = {kind!r} is taken by {known.__name__}")
    backends[kind] = cls


def find_backend(backends: Mapping[str, type[T]], kind: str, package: str) -> type[T]:
    """Return the class of a kind.

    Args:
        backends: the registry.
        kind: of a configuration.
        package: the framework's, for the message.

    Raises:
        ValueError: none is registered for the kind.
    """
    if kind not in backends:
        raise ValueError(
            f"memory.kind = {kind!r}: {package} has no backend for it, only for "
            f"{', '.join(map(repr, backends))}: register one with {package}.register_backend"
        )
    return backends[kind]
