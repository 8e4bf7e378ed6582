"""Contents of files, and writing them so that a reader finds the old one or the new one."""

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def to_json(data: Any, indent: int | None = None) -> str:
    """Return JSON with a line's end; a float that is not finite, which JSON lacks, is null."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def to_bytes(text: str) -> bytes:
    """Return text as UTF-8; file names in it that are not UTF-8 keep their bytes."""
    return text.encode("utf-8", "surrogateescape")


def to_png(figure: "Figure", dpi: int = 120) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by a file that holds `data`; after a failure the old file is still there.

    Raises:
        OSError: the file system refuses; its `filename` is set.
    """
    if not path.name:  # of . and /
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # A failed write, unlike a failed open, does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
