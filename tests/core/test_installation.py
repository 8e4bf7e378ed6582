"""Packages of the same names elsewhere, or in their place, stop the command."""

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from mc_core import installation
from mc_core.errors import UserError
from mc_core.installation import DISTRIBUTION, GENERIC_NAMES, check_packages, source_commit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder with the three packages, which is searched after `foreign`."""
    root = tmp_path / "installed"
    for name in GENERIC_NAMES:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(f'"""{name} of this project."""\n')
    folders = [str(tmp_path / "foreign"), str(root)]
    monkeypatch.setattr(installation, "find_spec", lambda name: PathFinder.find_spec(name, folders))
    return root


def record(root: Path) -> None:
    """Write the metadata of an installed wheel."""
    folder = root / f"{DISTRIBUTION.replace('-', '_')}-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {DISTRIBUTION}\n")
    lines = [
        f"{file},sha256={installation._sha256(root / file)},{(root / file).stat().st_size}\n"
        for file in (f"{name}/__init__.py" for name in GENERIC_NAMES)
    ]
    (folder / "RECORD").write_text("".join(lines))


@pytest.mark.parametrize("recorded", [False, True])
def test_own_packages_are_accepted(installed, recorded):
    if recorded:
        record(installed)
    check_packages(installed)


@pytest.mark.parametrize("name", GENERIC_NAMES)
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py"])
def test_foreign_package_is_named(installed, name, file):
    foreign = installed.parent / "foreign" / file.format(name)
    foreign.parent.mkdir(parents=True)
    foreign.write_text("raise AssertionError('must not be imported')\n")
    path = foreign.parent if foreign.name == "__init__.py" else foreign
    with pytest.raises(UserError, match=f"`import {name}` finds {path}, not {installed / name}"):
        check_packages(installed)


def test_foreign_folder_without_init_is_named(installed):
    """A folder is imported if no package of its name follows on the path."""
    (installed / "bench" / "__init__.py").unlink()
    (installed.parent / "foreign" / "bench").mkdir(parents=True)
    with pytest.raises(UserError, match=f"finds {installed.parent / 'foreign' / 'bench'}"):
        check_packages(installed)


def test_missing_package_is_named(installed):
    (installed / "parity" / "__init__.py").unlink()
    (installed / "parity").rmdir()
    with pytest.raises(UserError, match="parity is missing: reinstall memory-caching-jax"):
        check_packages(installed)


def test_overwritten_package_is_named(installed):
    """Another distribution with a package of the same name, installed later in the same folder."""
    record(installed)
    (installed / "train" / "__init__.py").write_text("")
    with pytest.raises(UserError, match=r"train/__init__\.py belongs to another package"):
        check_packages(installed)


@pytest.mark.parametrize(("module", "name"), [("mc_core", "train"), ("train", "bench")])
def test_command_refuses_a_foreign_package(tmp_path, module, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise AssertionError('must not be imported')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, "variants"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith(f"mc: `import {name}` finds {tmp_path / name}, not ")
    assert done.stderr.count("\n") == 1


def test_source_commit_names_commit_changes_or_version(tmp_path):
    find = source_commit.__wrapped__  # without the cache
    assert re.fullmatch(r"unknown \(version \d+\.\d+.*\)", find(tmp_path))
    (tmp_path / "code.py").write_text("x = 1\n")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    for words in (["init", "-q"], ["add", "code.py"], [*identity, "commit", "-q", "-m", "m"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    head = ["git", "-C", str(tmp_path), "rev-parse", "HEAD"]
    commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout[:12]
    assert find(tmp_path) == commit
    (tmp_path / "new.txt").write_text("not tracked")
    assert find(tmp_path) == commit
    (tmp_path / "code.py").write_text("x = 2\n")
    assert find(tmp_path) == f"{commit}-modified"
