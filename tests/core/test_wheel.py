"""The wheel: its files, `mc train` of a shipped configuration, and its types for a user's mypy."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.distributions import NOT_SOURCES, ROOT

pytestmark = pytest.mark.slow

BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
USER = """\
from flax import nnx
from mc_core import MCConfig, TitansConfig
from mc_jax import MemoryCachingLayer

config = MCConfig(d_model=8, num_heads=2, memory=TitansConfig())
layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0))
reveal_type(layer.config)
MCConfig(d_model="8", num_heads=2)
MemoryCachingLayer(TitansConfig(), rngs=nnx.Rngs(0))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the working tree, built without network access."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    import numpy

    (packages / "libraries.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n")
    return folder / "bin" / "python"


def test_wheel_has_configurations_and_type_markers(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert f"train/configs/{file.relative_to(ROOT / 'configs').as_posix()}" in names
    for file in (ROOT / "train" / "harness" / "tasks").glob("*.yaml"):
        assert f"train/harness/tasks/{file.name}" in names
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"bench", "mc_core", "mc_jax", "mc_torch", "parity", "train"}
    assert {f"{name}/py.typed" for name in tops} <= names


def test_shipped_configuration_trains_in_an_empty_folder(python, tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    words = ["run.steps=2", "optimizer.warmup_steps=1", "data.validation_bytes=4096"]
    done = subprocess.run(
        [python, "-m", "mc_core", "train", "demo_none", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs" / "demo_none" / "report.json").is_file()


def test_mypy_sees_the_types_of_the_wheel(python, tmp_path):
    (tmp_path / "user.py").write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, "user.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == 'user.py:7: note: Revealed type is "mc_core.config.MCConfig"'
    assert lines[1].startswith('user.py:8: error: Argument "d_model" to "MCConfig" has incompat')
    assert 'incompatible type "TitansConfig"; expected "MCConfig"' in lines[2]
    assert lines[3] == "Found 2 errors in 1 file (checked 1 source file)"
