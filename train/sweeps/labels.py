"""Labels of a sweep's rows in tables and plots."""

import json
from typing import Any

from train.sweeps.results import RunResult


def label(result: RunResult, *without: str) -> str:
    """Return the label of a row: the values of its overrides, except for some keys.

    Strings are shown without their key, other values with the last part of the key.
    """
    given = {key: value for key, value in result["overrides"].items() if key not in without}
    return " ".join(shown(key, value) for key, value in given.items()) or "base"


def shown(key: str, value: Any) -> str:
    """Return the text of an override in a label."""
    words = [value] if isinstance(value, str) else value
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return "+".join(words)
    return f"{key.rpartition('.')[2]}={value if isinstance(value, float) else json.dumps(value)}"
