"""Comparison of the configurations of two runs."""

from typing import Any

# Keys without an effect on the parameters, apart from rounding. They may change when a run is
# resumed.
FREE_KEYS = {"model.scan_layers"} | {
    f"run.{key}"
    for key in (
        "directory",
        "distributed",
        "mesh.data",
        "mesh.fsdp",
        "mesh.heads",
        "mesh.context",
        "log_every",
        "save_every",
        "keep",
        "validate_every",
        "validate_bytes",
        "sample_tokens",
        "profile",
        "peak_flops",
    )
}


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key with an effect that differs, and both values; None if all are equal."""
    left, right = _flatten(old), _flatten(new)
    for key in sorted(left.keys() | right.keys()):
        if key not in FREE_KEYS and left.get(key) != right.get(key):
            return key, left.get(key), right.get(key)
    return None


def _flatten(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    items: dict[str, Any] = {}
    for key, value in data.items():
        items |= _flatten(value, f"{path}.{key}" if path else key)
    return items
