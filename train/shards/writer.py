"""One shard: its tokens, and the text of its held-out documents."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from heapq import merge
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from mc_core.errors import UserError
from mc_core.files import to_json, write_atomic
from train.data.documents import SHARD_SUFFIX, is_held_out
from train.data.separator import Separator, choose_separator
from train.data.tokenizer import Encode, load_tokenizer, make_encoder
from train.shards.blocks import WRITER_OPTIONS, BlockWriter, token_dtype
from train.shards.manifest import ShardFile, describe_file
from train.shards.plan import ShardOptions, Span, read_span

ANY_SIZE = 2**32  # vocabulary sizes are checked against the model when a run starts
OPEN_FILES = 256  # that are merged at once


class ShardJob(NamedTuple):
    """What a process needs to write a shard."""

    number: int
    spans: list[Span]
    folder: Path
    options: ShardOptions


class WrittenShard(NamedTuple):
    """The files of a shard; None if it has no such documents."""

    train: ShardFile | None
    held_out: ShardFile | None


def vocab_size_of(tokenizer: Tokenizer | None) -> int:
    """Return the number of tokens of a tokenizer; None is bytes."""
    return 256 if tokenizer is None else max(tokenizer.get_vocab().values()) + 1


def record_path(folder: Path, number: int) -> Path:
    """Return the path of the record of a finished shard, which exists until the manifest does."""
    return folder / f".shard-{number:05d}.json"


def load_record(folder: Path, number: int) -> WrittenShard | None:
    """Return a shard that an earlier session has finished, or None."""
    try:
        content = json.loads(record_path(folder, number).read_text())
        files = [None if entry is None else ShardFile(**entry) for entry in content]
        if all(file is None or (folder / file.name).stat().st_size == file.size for file in files):
            return WrittenShard(*files)
    except (OSError, ValueError, TypeError):
        pass
    return None


def write_shard(job: ShardJob) -> WrittenShard:
    """Write a shard and its held-out documents, then their record.

    Each file is renamed when it is complete, and the record is written last.

    Raises:
        UserError: a document cannot be tokenized, or a file cannot be written.
        OSError: a file cannot be read or written.
    """
    tokenizer, encode = _encoder(job.options.tokenizer)
    separator = choose_separator(job.options.separator, tokenizer)
    path = job.folder / f"train-{job.number:05d}{SHARD_SUFFIX}"
    held_out: dict[str, bytes] = {}
    count = size = 0
    with _Renamed(path) as temporary:
        writer = BlockWriter(temporary, token_dtype(vocab_size_of(tokenizer)))
        for span in job.spans:
            for document in read_span(span, job.options.field):
                digest = hashlib.sha256(document).hexdigest()
                if is_held_out(digest, job.options.validation_fraction):
                    held_out[digest] = document
                    continue
                try:
                    writer.add(encode_document(document, separator, encode))
                except UserError as error:
                    raise UserError(f"{span.path}: {error}") from error
                count += 1
                size += len(document)
        writer.close()
    train = describe_file(path, path.name, writer.tokens, count, size)
    if not writer.tokens:
        path.unlink()
    texts = [held_out[digest] for digest in sorted(held_out)]
    part = job.folder / f".held-out-{job.number:05d}{SHARD_SUFFIX}"
    found = WrittenShard(
        train if writer.tokens else None, write_documents(part, texts) if texts else None
    )
    entries: list[Any] = [None if file is None else asdict(file) for file in found]
    write_atomic(record_path(job.folder, job.number), to_json(entries).encode())
    return found


def encode_document(document: bytes, separator: Separator, encode: Encode) -> np.ndarray:
    """Return the tokens of a document and of the separator after it."""
    if separator.if_missing and separator.ends(document):
        return encode(document)
    if separator.token is None:
        return encode(document + separator.text)
    tokens = encode(document)
    return np.append(tokens, tokens.dtype.type(separator.token))


def write_documents(path: Path, documents: Iterator[bytes] | list[bytes]) -> ShardFile:
    """Write documents, without their equals that follow them, as the records of a file."""
    count = size = 0
    previous = None
    with _Renamed(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        for document in documents:
            if document != previous:
                writer.write(document)
                count += 1
                size += len(document)
            previous = document
        writer.close()
    return describe_file(path, path.name, 0, count, size)


def merge_documents(paths: list[Path], target: Path) -> ShardFile:
    """Merge files of documents that are sorted by SHA-256."""
    groups = [paths[i : i + OPEN_FILES] for i in range(0, len(paths), OPEN_FILES)]
    if len(groups) > 1:
        parts = [target.with_name(f".merged-{i:05d}{SHARD_SUFFIX}") for i in range(len(groups))]
        for group, part in zip(groups, parts, strict=True):
            merge_documents(group, part)
        found = merge_documents(parts, target)
        for part in parts:
            part.unlink()
        return found
    streams = [_documents_of(path) for path in paths]
    return write_documents(target, merge(*streams, key=lambda text: hashlib.sha256(text).digest()))


def _documents_of(path: Path) -> Iterator[bytes]:
    reader = ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
        yield reader.read([index])[0]
    reader.close()


@lru_cache(maxsize=1)
def _encoder(name: str) -> tuple[Tokenizer | None, Encode]:
    tokenizer = load_tokenizer(name, ANY_SIZE)
    return tokenizer, make_encoder(tokenizer, "a document")


class _Renamed:
    """Context of a temporary file that is renamed to `path` when it is complete."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        return self._temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is None:
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._temporary.replace(self._path)
            return
        self._temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # of array_record
            reason = str(error).partition(";")[0]
            raise UserError(
                f"{self._path}: {reason}: free disk space, or use another --out, and run the same "
                "command: it keeps finished shards"
            ) from error
