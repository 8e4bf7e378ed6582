"""Metadata of the distribution, the workflow and the citation agree; sdists are reproducible."""

import io
import re
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tools.distributions import normalize_sdist

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_every_package_is_distributed():
    tops = {name for name in PACKAGES if "." not in name}
    folders = {file.parent for top in tops for file in (ROOT / top).rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    # Folders of data are packages of setuptools.
    data = {file.parent.relative_to(ROOT) for file in (ROOT / "configs").rglob("*.yaml")}
    assert set(PACKAGES) == names | {".".join(("train", *folder.parts)) for folder in data}


def test_every_top_level_package_is_typed():
    for name in PACKAGES:
        if "." not in name:
            assert (ROOT / name / "py.typed").is_file(), name
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["*"]


@pytest.mark.skipif(not WORKFLOW.exists(), reason="not part of the sdist")
def test_workflow_covers_supported_versions():
    matrix = yaml.safe_load(WORKFLOW.read_text())["jobs"]["test"]["strategy"]["matrix"]
    found = [re.fullmatch(r".* :: (3\.\d+)", line) for line in PROJECT["project"]["classifiers"]]
    assert matrix["python"] == [version[1] for version in found if version]
    assert PROJECT["project"]["requires-python"] == f">={matrix['python'][0]}"
    oldest, newest = matrix["constraints"]
    bounds = dict(line.split(">=") for line in PROJECT["project"]["optional-dependencies"]["jax"])
    pins = dict(pin.split("==") for pin in oldest.split())
    assert pins["flax"] == bounds["flax"]
    assert pins["jax"] == pins["jaxlib"] == bounds["jax"]
    assert newest == ""


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]


def pack(path: Path, names: list[str], time: int, mode: int) -> Path:
    """Write an archive of files that contain their names, in a folder."""
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("p")
        folder.type, folder.mode, folder.mtime = tarfile.DIRTYPE, mode | 0o100, time
        archive.addfile(folder)
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.mode, member.uname = len(name), time, mode, str(time)
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def test_normalized_sdists_are_equal(tmp_path):
    """For archives that differ in times, modes, owners and order."""
    one = pack(tmp_path / "1.tar.gz", ["p/a", "p/b"], 1, 0o600)
    other = pack(tmp_path / "2.tar.gz", ["p/b", "p/a"], 2, 0o664)
    assert one.read_bytes() != other.read_bytes()
    targets = [tmp_path / "x" / "p.tar.gz", tmp_path / "y" / "p.tar.gz"]
    for source, target in zip((one, other), targets, strict=True):
        target.parent.mkdir()
        normalize_sdist(source, target, 1_700_000_000)
    assert targets[0].read_bytes() == targets[1].read_bytes()
    with tarfile.open(targets[0]) as archive:
        assert archive.getnames() == ["p", "p/a", "p/b"]
        assert archive.extractfile("p/b").read() == b"p/b"
        assert {member.mtime for member in archive} == {1_700_000_000}
        assert [member.mode for member in archive] == [0o755, 0o644, 0o644]
