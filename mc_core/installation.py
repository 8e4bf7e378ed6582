"""Check that the packages with generic names are those of this distribution."""

import base64
import hashlib
from importlib.metadata import distributions
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
