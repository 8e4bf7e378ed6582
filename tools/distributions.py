"""`python -m tools.distributions FOLDER`: build the sdist and the wheel reproducibly.

Two builds of a commit with the same version of setuptools are equal byte for byte, independent of
the umask, the time and files of earlier builds. The wheel is built from the sdist.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
EPOCH = "SOURCE_DATE_EPOCH"
NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs")


def build(folder: Path, options: Sequence[str] = ()) -> list[Path]:
    """Build into a folder, and return the paths of the sdist and the wheel.

    Args:
        folder: output folder; created if missing.
        options: further arguments of `python -m build`.

    Raises:
        subprocess.CalledProcessError: a build failed.
    """
    epoch = os.environ.get(EPOCH) or _commit_time()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        temporary = Path(scratch)
        # setuptools would read the list of files of an earlier build.
        tree = shutil.copytree(
            ROOT, temporary / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCES)
        )
        packed = _build(tree, temporary / "sdist", ["--sdist", *options], epoch)
        sdist = folder / packed.name
        normalize_sdist(packed, sdist, int(epoch))
        with tarfile.open(sdist) as archive:
            archive.extractall(temporary, filter="data")
        source = temporary / sdist.name.removesuffix(".tar.gz")
        wheel = _build(source, temporary / "wheel", ["--wheel", *options], epoch)
        return [sdist, Path(shutil.copyfile(wheel, folder / wheel.name))]


def normalize_sdist(source: Path, target: Path, epoch: int) -> None:
    """Write an sdist with sorted members and fixed times, modes and owners.

    setuptools ignores `SOURCE_DATE_EPOCH` in an sdist.
    """
    with (
        tarfile.open(source) as old,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            fixed = tarfile.TarInfo(member.name)
            fixed.type, fixed.size, fixed.mtime = member.type, member.size, epoch
            fixed.mode = 0o755 if member.isdir() else 0o644
            new.addfile(fixed, old.extractfile(member) if member.isfile() else None)


def _build(source: Path, folder: Path, options: Sequence[str], epoch: str) -> Path:
    command = [sys.executable, "-m", "build", "--outdir", str(folder), *options, str(source)]
    environment = os.environ | {EPOCH: epoch}
    done = subprocess.run(
        command, env=environment, umask=0o022, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
    (built,) = folder.iterdir()
    return built


def _commit_time() -> str:
    """Return the time of the last commit, in seconds since 1970."""
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(*build(Path(sys.argv[1]), sys.argv[2:]), sep="\n")
