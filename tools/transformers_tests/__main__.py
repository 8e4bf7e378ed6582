"""Run the common model tests of the installed transformers: `python -m tools.transformers_tests`.

They are in the source distribution, which is downloaded. Two modules that it lacks are replaced by
empty ones: the tests of exporters, and of generation. Requires the package `parameterized`.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
EMPTY = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
}


def extract_tests(folder: Path) -> None:
    """Download the tests of the installed version of transformers to `folder`/tests."""
    version = importlib.metadata.version("transformers")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
    subprocess.run([*command, f"transformers=={version}", "--dest", str(folder)], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (folder / f"transformers-{version}" / "tests").rename(folder / "tests")
    for name, source in EMPTY.items():
        path = folder / "tests" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
    for path in (folder / "tests", *(folder / "tests" / name for name in EMPTY)):
        (path if path.is_dir() else path.parent).joinpath("__init__.py").touch()


def main(arguments: list[str]) -> int:
    """Run the tests with further arguments of pytest, and return the exit code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract_tests(folder)
        shutil.copy(Path(__file__).with_name("cases.py"), folder / "tests" / "test_cases.py")
        options = ["-q", "-rs", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options, "tests/test_cases.py"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
