"""The environment of the report: a venv with both frameworks, which keeps installed packages."""

import re
import site
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
# Alternatives that are compared, each installed by itself: a failure skips its comparison.
PEERS = (
    ("titans-pytorch==0.5.5",),
    ("--no-deps", "flash-linear-attention==0.6.0", "fla-core==0.6.0", "einops"),
)
REFERENCE = re.compile(r"memory-caching-jax\[(.+)\]")  # of an extra to other extras


class EnvironmentFailure(Exception):
    """The environment cannot be made; the message has the reason."""


def make_environment(folder: Path, log: Path, limit: float, *, cuda: bool) -> Path:
    """Make a venv, install what is missing, and return its Python.

    Packages of the calling interpreter are visible in the venv, so that builds of jax and torch
    that the machine already has are used, without a download.

    Args:
        folder: folder of the venv; an existing one is completed.
        log: file for the output of pip.
        limit: seconds for all of it.
        cuda: install CUDA builds, and the packages that are compared.

    Raises:
        EnvironmentFailure: venv or pip failed, or took too long.
    """
    end = time.monotonic() + limit
    python = folder / "bin" / "python"
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)], log, end)
    _inherit(folder)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    for group in requirements(cuda=cuda):
        _call([*pip, *group], log, end)
    for peer in PEERS if cuda else ():
        try:
            _call([*pip, *peer], log, end)
        except EnvironmentFailure as failure:
            print(f"not installed: {' '.join(peer)} ({failure})", file=sys.stderr)
    return python


def requirements(*, cuda: bool) -> list[list[str]]:
    """Return the requirements of the extras `torch` and `train`, each for its own call of pip.

    torch pins versions of NVIDIA's packages that may be older than those that jax needs. In one
    call, pip would download one release of torch after another in search of a common version. In
    two calls it installs the newer versions, which are compatible within a major version of CUDA.

    Args:
        cuda: request CUDA builds, unless a CUDA plugin of jax is installed.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    train = [*project["dependencies"], *_extra(extras, "train")]
    plugins = {name for path in sys.path for name in CUDA_PLUGINS if _has(Path(path), name)}
    if cuda and not plugins:
        train.append("jax[cuda13]")
    return [_extra(extras, "torch"), list(dict.fromkeys(train))]


def _extra(extras: dict[str, list[str]], name: str) -> list[str]:
    """Return the requirements of an extra, with those of the extras to which it refers."""
    found: list[str] = []
    for requirement in extras[name]:
        other = REFERENCE.fullmatch(requirement)
        if other is None:
            found.append(requirement)
        else:
            found += [x for part in other[1].split(",") for x in _extra(extras, part)]
    return found


def _has(folder: Path, distribution: str) -> bool:
    return any(folder.glob(f"{distribution.replace('-', '_')}-*.dist-info"))


def _inherit(folder: Path) -> None:
    """Make the packages of the calling interpreter visible in the venv."""
    (packages,) = folder.glob("lib/python*/site-packages")
    folders = [
        *site.getsitepackages(),
        *([site.getusersitepackages()] if site.ENABLE_USER_SITE else []),
    ]
    text = "\n".join(path for path in folders if Path(path) != packages)
    (packages / "inherited.pth").write_text(f"{text}\n")


def _call(command: list[str], log: Path, end: float) -> None:
    """Run a command until `end`, with its output in the log."""
    with log.open("ab") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, timeout=max(1.0, end - time.monotonic())
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentFailure("stopped at its time limit") from error
    if done.returncode:
        raise EnvironmentFailure(last_line(log) or f"exit code {done.returncode}")


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]
