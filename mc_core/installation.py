"""The installed packages: their names and the commit of their source."""

import base64
import functools
import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

from mc_core.errors import UserError

DISTRIBUTION = "memory-caching-jax"
GENERIC_NAMES = ("bench", "parity", "train")
ROOT = Path(__file__).parents[1].resolve()  # folder that contains the packages


def check_packages(root: Path = ROOT) -> None:
    """Check that `bench`, `parity` and `train` are imported from the folder of `mc_core`.

    Nothing is imported.

    Args:
        root: folder that contains the packages.

    Raises:
        UserError: Python finds a package elsewhere, or another distribution has replaced its
            `__init__.py`.
    """
    for name in GENERIC_NAMES:
        found = _find(name)
        if found is None:
            raise UserError(f"{root / name} is missing: reinstall {DISTRIBUTION}")
        if found.resolve() != root / name:
            raise UserError(
                f"`import {name}` finds {found}, not {root / name}: "
                "uninstall or rename it, or remove its folder from PYTHONPATH"
            )
    for file in _replaced(root):
        raise UserError(
            f"{file} belongs to another package: install {DISTRIBUTION} in its own environment"
        )


@functools.cache
def source_commit(root: Path = ROOT) -> str:
    """Return the commit of the source, or the version of the package if it is not a checkout.

    Args:
        root: folder that contains the packages.

    Returns:
        12 hexadecimal digits, with "-modified" if tracked files differ from the commit; otherwise
        "unknown" and the version.
    """
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        if commit and changes is not None:
            return f"{commit}-modified" if changes else commit
    try:
        return f"unknown (version {version(DISTRIBUTION)})"
    except PackageNotFoundError:
        return "unknown"


def _git(root: Path, *words: str) -> str | None:
    """Return the output of a git command, or None if it fails."""
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _find(name: str) -> Path | None:
    """Return the folder or file that a top-level import would load."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or name)


def _replaced(root: Path) -> list[Path]:
    """Return the installed `__init__.py` files that differ from the record of the wheel."""
    names = {f"{name}/__init__.py" for name in GENERIC_NAMES}
    return [
        root / file
        for found in distributions(name=DISTRIBUTION, path=[str(root)])
        for file in found.files or ()
        if str(file) in names and file.hash and file.hash.value != _sha256(root / file)
    ]


def _sha256(file: Path) -> str:
    """Return the hash of a file as in RECORD."""
    digest = hashlib.sha256(file.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")
