"""Training runs in this process that end early: stopped, or on a full disk."""

import io
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import load_config
from train.loop import train


def quiet(config: Path, *words: str) -> str:
    """Train in this process, and return what is printed."""
    console = Console(file=io.StringIO(), width=200)
    train(load_config(config, words), console)
    return console.file.getvalue()


class Stop(Exception):
    """Stands for a process that ends."""


def train_until(step: int, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop when the checkpoint of a step is about to be saved."""
    save = Checkpoints.save

    def save_or_stop(self, at, *rest):
        if at == step:
            raise Stop
        save(self, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_or_stop)
        with pytest.raises(Stop):
            quiet(config)


@contextmanager
def full_disk(size: int):
    """Refuse to let any file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
