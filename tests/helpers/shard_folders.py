"""Folders of shards of random documents."""

import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from helpers.tiny_run import WORDS
from train.config import TextConfig
from train.data.documents import corpus_files, is_held_out
from train.shards.manifest import Manifest
from train.shards.plan import ShardOptions
from train.shards.tokenize import tokenize

SMALL = ShardOptions(validation_fraction=0.3, shard_bytes=9_000)


def write_texts(folder: Path, count: int = 24, words: int = 500, seed: int = 0) -> Path:
    """Write distinct documents of words, each of about 2,000 bytes."""
    folder.mkdir(parents=True)
    drawn = random.Random(seed)
    for number in range(count):
        text = " ".join(drawn.choices(WORDS.split(), k=words))
        (folder / f"{number:02d}.txt").write_text(
            f"{seed} {number}: {text}\n"[: -(number % 2) or None]
        )
    return folder


def write_shards(
    corpus: Path, folder: Path, options: ShardOptions = SMALL, jobs: int = 1
) -> tuple[Manifest, str]:
    """Tokenize a folder, and return the manifest and what is printed."""
    console = Console(file=io.StringIO(), width=200)
    manifest = tokenize([str(corpus)], folder, options, jobs, console)
    return manifest, console.file.getvalue()


def split_texts(corpus: Path, fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Return the training documents in the order of the files, and the held-out ones by hash."""
    texts = {hashlib.sha256(t).hexdigest(): t for t in map(Path.read_bytes, corpus_files(corpus))}
    train = [text for digest, text in texts.items() if not is_held_out(digest, fraction)]
    return train, [texts[digest] for digest in sorted(texts) if is_held_out(digest, fraction)]


def stream_of(documents: list[bytes]) -> np.ndarray:
    """Return the bytes of documents, a newline after each that does not end with one."""
    return np.frombuffer(b"".join(d if d[-1:] == b"\n" else d + b"\n" for d in documents), np.uint8)


def data_of(*folders: Path, **keys: Any) -> TextConfig:
    """Return the data section of a run on folders of shards or text."""
    return TextConfig(tuple(map(str, folders)), window=64, validation_fraction=0.3, **keys)
