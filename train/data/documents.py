"""Documents of a corpus: files, the split into training and held-out documents, and limits."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mc_core.errors import UserError

# Folders of tokenized shards.
MANIFEST = "manifest.json"
FORMAT = "memory-caching-shards-1"
SHARD_SUFFIX = ".array_record"

# Tests are mostly data; the others differ between installations of one version.
STDLIB_WITHOUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
STDLIB_WITHOUT_PREFIX = ("_sysconfigdata", "config-", "__editable__")


def read_documents(corpus: Iterable[str], option: str = "data.corpus") -> Iterator[bytes]:
    """Read the files of a corpus; empty files inside folders are skipped.

    Args:
        corpus: files, folders, or words of `NAMED`.
        option: name of the option that lists them, for error messages.

    Raises:
        UserError: a path does not exist, is an empty file or folder, or has tokenized shards.
        OSError: a file cannot be read.
    """
    for word in corpus:
        documents = filter(None, map(Path.read_bytes, corpus_files(word, option)))
        first = next(documents, None)
        if first is None:
            folder = Path(word).is_dir()
            raise UserError(
                f"{word}: no file with text in this folder: use another"
                if folder
                else f"{word}: the file is empty: remove it from {option}"
            )
        yield first
        yield from documents


def corpus_files(word: str, option: str = "data.corpus") -> list[Path]:
    """Return the files of one word of a corpus, in order, without hidden files.

    Args:
        word: file, folder, or word of `NAMED`.
        option: name of the option that lists it, for error messages.

    Raises:
        UserError: the path does not exist, or is a folder of tokenized shards.
    """
    path = Path(word)
    if word in NAMED:
        return NAMED[word]()
    if has_shards(path):
        raise UserError(f"{word}: a folder of tokenized shards: {option} needs text here")
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if _is_visible_file(file, path)]
    if not path.exists():
        raise UserError(f"{word}: no such file or folder: correct {option}")
    return [path]


def has_shards(folder: Path) -> bool:
    """Return True for a folder that `mc tokenize` has written, or has begun to write."""
    return any(folder.glob(f"*{SHARD_SUFFIX}")) or _has_manifest(folder)


def _has_manifest(folder: Path) -> bool:
    try:
        with (folder / MANIFEST).open("rb") as file:
            return FORMAT.encode() in file.read(100)
    except OSError:
        return False


def _is_visible_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.is_file()


def stdlib_files() -> list[Path]:
    """Return the files of the standard library that every installation of this Python has."""
    return _python_files(Path(sysconfig.get_path("stdlib")))


def package_files() -> list[Path]:
    """Return the files of the installed packages that are UTF-8, without their tests."""
    roots = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return [file for root in roots for file in _python_files(Path(root)) if _is_utf8(file)]


def _python_files(root: Path) -> list[Path]:
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not any(
            part in STDLIB_WITHOUT or part.startswith(STDLIB_WITHOUT_PREFIX)
            for part in file.relative_to(root).parts
        )
    ]


def _is_utf8(file: Path) -> bool:
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


# Words that stand for the files of the running Python.
NAMED = {"stdlib": stdlib_files, "site-packages": package_files}


def distinct(documents: Iterable[bytes]) -> dict[str, bytes]:
    """Return the distinct documents by SHA-256, sorted by it; paths are ignored."""
    return dict(sorted((hashlib.sha256(text).hexdigest(), text) for text in documents))


def split(
    documents: dict[str, bytes], fraction: float, gap: int
) -> tuple[list[bytes], list[bytes]]:
    """Split documents into training and validation documents.

    Only the SHA-256 of a document decides, so equal documents are always in the same split. If a
    split would be empty, the document nearest to the threshold is moved to it. Of a single
    document, the last `fraction` is held out, and the `gap` bytes before it are dropped.

    Args:
        documents: distinct documents by SHA-256, sorted by it.
        fraction: share of the documents to hold out.
        gap: bytes between the two parts of a single document.
    """
    texts = list(documents.values())
    if len(texts) == 1:
        text = texts[0]
        held_out = text[len(clip(text, len(text) - max(1, round(len(text) * fraction)))) :]
        return [clip(text, max(0, len(text) - len(held_out) - gap))], [held_out]
    count = sum(is_held_out(digest, fraction) for digest in documents)
    count = min(max(count, 1), len(texts) - 1)
    return texts[count:], texts[:count]


def is_held_out(digest: str, fraction: float) -> bool:
    """Return True if the document with this SHA-256 belongs to the held-out share."""
    return int(digest[:16], 16) < fraction * 2**64


def first_documents(documents: list[bytes], limit: int | None) -> list[bytes]:
    """Return the first documents that have at least `limit` bytes together; None: all."""
    if limit is None:
        return documents
    sizes = np.cumsum([len(document) for document in documents])
    return documents[: int(np.searchsorted(sizes, limit)) + 1]


def clip(text: bytes, limit: int | None) -> bytes:
    """Return at most the first `limit` bytes, without splitting a UTF-8 character."""
    if limit is None or len(text) <= limit:
        return text
    while limit and text[limit] & 0xC0 == 0x80:
        limit -= 1
    return text[:limit]
