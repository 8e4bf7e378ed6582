"""Options and values of options that several commands have."""

from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from mc_core.aggregations import AGGREGATIONS
from mc_core.errors import UserError
from mc_core.memories import MEMORIES

Kind = StrEnum("Kind", list(MEMORIES))  # type: ignore[misc]
Aggregation = StrEnum("Aggregation", list(AGGREGATIONS))  # type: ignore[misc]


def output_file(what: str) -> Any:
    """Return the option of an output file, checked before the command runs.

    Args:
        what: help text.
    """
    return typer.Option(help=what, dir_okay=False, callback=_check_folder)


def utf8(word: str) -> str:
    """Return a word of the command line as the UTF-8 text that it is in any locale.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return word.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{word}: must be UTF-8 text") from error


def _check_folder(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{path}: its folder does not exist")
    return path
