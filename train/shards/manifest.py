"""The manifest of a folder of shards, and the check that the shards are those of the manifest."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mc_core.errors import UserError
from mc_core.files import to_json, write_atomic
from mc_core.serialization import Serializable
from train.data.documents import FORMAT, MANIFEST

CHECKED = ".checked.json"  # size and modification time of the files whose hash has been checked


@dataclass(frozen=True)
class ShardFile:
    """A file of a folder of shards.

    Attributes:
        name: file name.
        tokens: number of tokens, including separators; 0 for held-out text.
        documents: number of documents.
        text_bytes: size of their text, without separators.
        size: size of the file in bytes.
        sha256: hash of the file.
    """

    name: str
    tokens: int
    documents: int
    text_bytes: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest(Serializable):
    """Content of a folder of shards.

    Attributes:
        format: version of the format.
        tokenizer: `bytes`, or the SHA-256 of the tokenizer file.
        vocab_size: number of tokens of the tokenizer.
        separator: separator that follows each document, as `data.separator`.
        validation_fraction: held-out share of the documents.
        tokens: number of training tokens, including separators.
        text_bytes: size of the training text.
        documents: number of training documents.
        shards: files with training tokens, in order.
        held_out: file with the text of the held-out documents, sorted by their SHA-256; None if
            there are none.
    """

    format: str
    tokenizer: str
    vocab_size: int
    separator: str | None
    validation_fraction: float
    tokens: int
    text_bytes: int
    documents: int
    shards: tuple[ShardFile, ...]
    held_out: ShardFile | None = None

    @property
    def files(self) -> tuple[ShardFile, ...]:
        """All files."""
        return self.shards + (() if self.held_out is None else (self.held_out,))


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and check its files; see `check_files`.

    Raises:
        UserError: the manifest is missing or cannot be read, or a file is missing or has changed.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: correct data.corpus")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file: mc tokenize writes it at its end; run the command again, "
            "which keeps finished shards"
        )
    try:
        manifest = Manifest.from_dict(json.loads(path.read_text()))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a manifest of shards: {error}") from error
    if manifest.format != FORMAT:
        raise UserError(f"{path}: format = {manifest.format!r}: must be {FORMAT!r}")
    check_files(folder, manifest)
    return manifest


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder, whose files have just been written."""
    write_atomic(folder / MANIFEST, to_json(manifest.to_dict(), indent=1).encode())
    _record_checked(folder, {file.name: _stat(folder / file.name) for file in manifest.files})


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check size and hash of all files.

    A hash is computed only if size or modification time have changed since the last check, like
    in git's index, so a start does not read the corpus.

    Raises:
        UserError: a file is missing or has changed.
    """
    checked = _read_checked(folder)
    current = {}
    for file in manifest.files:
        path = folder / file.name
        try:
            stat = _stat(path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: restore it, or tokenize again") from error
        same = stat[0] == file.size
        if same and checked.get(file.name) != stat:
            same = file_hash(path) == file.sha256
        if not same:
            raise UserError(
                f"{path}: differs from {MANIFEST} (size or SHA-256): restore it, or tokenize again"
            )
        current[file.name] = stat
    if current != checked:
        _record_checked(folder, current)


def describe_file(path: Path, name: str, tokens: int, documents: int, text_bytes: int) -> ShardFile:
    """Return the entry of a file in the manifest.

    Args:
        path: path of the file.
        name: its name in the folder.
        tokens: see `ShardFile`.
        documents: see `ShardFile`.
        text_bytes: see `ShardFile`.
    """
    return ShardFile(name, tokens, documents, text_bytes, path.stat().st_size, file_hash(path))


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _read_checked(folder: Path) -> dict[str, list[int]]:
    try:
        found = json.loads((folder / CHECKED).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _record_checked(folder: Path, files: dict[str, list[int]]) -> None:
    """Record checked files; on a read-only disk, every start computes the hashes."""
    try:
        write_atomic(folder / CHECKED, json.dumps(files).encode())
    except OSError:
        return
