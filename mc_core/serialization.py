"""Strict conversion of configurations to and from dictionaries."""

import dataclasses
from typing import Any, ClassVar, Self

from mc_core.checks import check_keys, raise_config_error


class Serializable:
    """Base class of dataclasses that convert to and from dictionaries."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary of plain values. A memory's dictionary includes its `kind`."""
        out: dict[str, Any] = {"kind": self.kind} if hasattr(self, "kind") else {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            value = list(value) if isinstance(value, tuple) else value
            out[field.name] = value.to_dict() if isinstance(value, Serializable) else value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from a dictionary of the form of `to_dict`.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        names = [f.name for f in fields]
        if hasattr(cls, "kind") and isinstance(data, dict) and "kind" in data:
            if data["kind"] != cls.kind:
                raise_config_error(cls.__name__, "kind", data["kind"], repr(cls.kind))
            data = {key: value for key, value in data.items() if key != "kind"}
        check_keys(cls.__name__, data, names, required)
        return cls(**{key: cls._load(key, value) for key, value in data.items()})

    @classmethod
    def _load(cls, key: str, value: Any) -> Any:
        del key
        return value
