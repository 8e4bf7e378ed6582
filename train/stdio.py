"""Standard streams: text in any encoding, JSON lines in UTF-8."""

import io
import json
import sys
from pathlib import Path
from typing import Any


def replace_unencodable() -> None:
    """Replace characters that the encoding of stdout and stderr does not support."""
    for stream in (sys.stdout, sys.stderr):
        # By default stderr writes escapes such as \xe9, which do not raise.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def json_line(row: dict[str, Any]) -> bytes:
    """Return an object as one line of UTF-8 JSON."""
    # Python's escape of a lone surrogate is also its JSON escape.
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def print_bytes(data: bytes) -> None:
    """Write UTF-8 to stdout, in any locale."""
    if sys.stdout is None:  # closed
        return
    if not hasattr(sys.stdout, "buffer"):
        sys.stdout.write(data.decode())
        return
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, or of stdin if the path is `-`.

    Raises:
        OSError: the file cannot be read.
    """
    return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()


def is_terminal() -> bool:
    """Return True if stdout is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()
