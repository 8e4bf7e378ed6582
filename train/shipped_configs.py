"""Configurations that are installed with the package, and the CONFIG argument of the commands."""

import difflib
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mc_core.errors import UserError

_INSTALLED = Path(__file__).parent / "configs"
# A wheel contains the folder configs/ of the repository as train/configs/.
FOLDER = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"
SUFFIX = ".yaml"


@dataclass(frozen=True)
class ShippedConfig:
    """A shipped configuration, as listed by `mc configs`.

    Attributes:
        name: value of a CONFIG argument.
        command: command that takes it, `train` or `sweep`.
        task: `data.task` of its runs.
        description: first sentence of its first comment.
    """

    name: str
    command: str
    task: str
    description: str


def shipped_names() -> list[str]:
    """Return the names of the shipped configurations, such as `demo` and `mqar/base`."""
    files = sorted(FOLDER.rglob(f"*{SUFFIX}"), key=lambda file: (len(file.parts), file))
    return [file.relative_to(FOLDER).with_suffix("").as_posix() for file in files]


def find_config(name: Path) -> Path:
    """Return the file of a CONFIG argument: an existing file, or the name of a shipped one.

    Raises:
        UserError: there is neither; the message has the nearest shipped names.
    """
    names, text = shipped_names(), name.as_posix()
    exists = os.path.exists(name)  # pipes included
    if text in names and (not exists or os.path.isdir(name)):
        return FOLDER / (text + SUFFIX)
    if exists:
        return name
    raise UserError(
        f"{name}: No such file or directory, and no shipped configuration; nearest names: "
        f"{', '.join(nearest(text, names))} (`mc configs` lists all)"
    )


def nearest(text: str, names: list[str]) -> list[str]:
    """Return up to three names that resemble a path, without its folder `configs` and suffix."""
    word = re.sub(rf"^(.*/)?configs/|{re.escape(SUFFIX)}$", "", text)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    return close or difflib.get_close_matches(word, names, n=1, cutoff=0.0)


def describe(name: str) -> ShippedConfig:
    """Return command, task and description of a shipped configuration.

    Raises:
        UserError: its file is invalid.
    """
    from train.config.yaml_files import read_yaml
    from train.sweeps.sweep_config import load_sweep

    path = FOLDER / (name + SUFFIX)
    is_sweep = not {"data", "model", "optimizer", "run"}.intersection(map(str, read_yaml(path)))
    return ShippedConfig(
        name,
        "sweep" if is_sweep else "train",
        _task(load_sweep(path).base if is_sweep else path),
        first_sentence(path.read_text(encoding="utf-8")),
    )


@functools.cache
def _task(path: Path) -> str:
    """Return the task of a run's file; sweeps share their bases."""
    from train.config import load_config

    return load_config(path).data.task


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment at the start of a YAML file."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    comment = " ".join(lines)
    sentence = re.match(r".*?[.?](?=\s|$)", comment)
    return sentence[0] if sentence else comment
