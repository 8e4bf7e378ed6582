"""JAX's cache of compiled programs on disk, on by default for the commands that train or decode."""

import hashlib
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"
LIMIT = "JAX_COMPILATION_CACHE_MAX_SIZE"
ENABLE = "JAX_ENABLE_COMPILATION_CACHE"
MAX_BYTES = 2**32
CPU_INFORMATION = Path("/proc/cpuinfo")


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder.

    JAX's own variables have precedence: `JAX_COMPILATION_CACHE_DIR` names another folder, and
    `JAX_ENABLE_COMPILATION_CACHE=false` disables the cache. Without a writable folder there is no
    cache. Processes that this one starts use the same folder.
    """
    if FOLDER in os.environ or os.environ.get(ENABLE, "").lower() in ("0", "false", "no", "off"):
        return
    try:
        folder = _user_folder() / "memory-caching-jax" / f"programs-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none
        return
    if not os.access(folder, os.W_OK):
        return
    settings = {FOLDER: str(folder)}
    if find_spec("filelock") and LIMIT not in os.environ:  # JAX needs it to keep a limit
        settings[LIMIT] = str(MAX_BYTES)
    os.environ.update(settings)
    if jax := sys.modules.get("jax"):  # imported by a user's module: it has read its variables
        for name, value in settings.items():
            jax.config.update(name.lower(), int(value) if name == LIMIT else value)


def _user_folder() -> Path:
    named = os.environ.get("XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def _processor() -> str:
    """Return a name of the processor's instruction set.

    Programs for a CPU contain its instructions, and homes may be shared by different machines.
    """
    try:
        lines = CPU_INFORMATION.read_text().splitlines()
    except OSError:
        lines = []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    words = (platform.machine(), platform.processor(), *features)
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
