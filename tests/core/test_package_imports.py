"""Imports between packages follow their layers, and each package imports only allowed libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BELOW = {
    "mc_core": set(),
    "mc_jax": {"mc_core"},
    "mc_torch": {"mc_core"},
    "parity": {"mc_core", "mc_jax", "mc_torch"},
    "bench": {"mc_core", "mc_jax", "mc_torch", "parity"},
    "train": {"mc_core", "mc_jax", "parity", "bench"},
}
# The entry point runs the command line, which is in train.
ENTRY_POINTS = {"mc_core/__main__.py"}
FOREIGN = {
    "mc_core": {"jax", "flax", "torch", "optax"},
    "mc_jax": {"torch", "optax"},
    "mc_torch": {"jax", "flax", "optax"},
    "parity": set(),
    "bench": set(),
    "train": {"torch"},
}


def imported(file: Path) -> set[str]:
    """Return the top-level packages that a file imports, including inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file}: a relative import"
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", BELOW)
def test_packages_do_not_import_higher_layers(package):
    files = [
        f for f in (ROOT / package).rglob("*.py") if str(f.relative_to(ROOT)) not in ENTRY_POINTS
    ]
    assert files
    forbidden = (BELOW.keys() - BELOW[package] - {package}) | FOREIGN[package]
    violations = {str(file.relative_to(ROOT)): imported(file) & forbidden for file in files}
    assert not {file: names for file, names in violations.items() if names}
