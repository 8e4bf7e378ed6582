"""The division of a corpus into shards, which depends only on its files and the options."""

import gzip
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

from mc_core.errors import UserError
from train.data.documents import corpus_files

LINES = ".jsonl"  # suffix of files with one document per line
COMPRESSED = ".jsonl.gz"  # the same, compressed; such files are not split
OPTION = "CORPUS"


@dataclass(frozen=True)
class ShardOptions:
    """Options of `mc tokenize` on which the shards depend.

    Attributes:
        tokenizer: `bytes`, or the path of a `tokenizer.json`.
        separator: separator after each document, as `data.separator`.
        validation_fraction: held-out share of the documents; 0 for none.
        shard_bytes: approximate size of the text of a shard.
        field: key of the text in the lines of `.jsonl` files.
    """

    tokenizer: str = "bytes"
    separator: str | None = None
    validation_fraction: float = 0.05
    shard_bytes: int = 2**27
    field: str = "text"


class Span(NamedTuple):
    """Bytes [start, stop) of a file; of a `.jsonl` file, the lines that start in them.

    A span of any other file is the whole file.
    """

    path: str
    start: int
    stop: int


class Plan(NamedTuple):
    """Shards and what they depend on.

    Attributes:
        shards: the spans of each shard, in order.
        digest: hash of files, tokenizer and options.
    """

    shards: list[list[Span]]
    digest: str

    @property
    def sizes(self) -> list[int]:
        """Bytes to read for each shard."""
        return [sum(span.stop - span.start for span in spans) for spans in self.shards]


def make_plan(corpus: Sequence[str], options: ShardOptions, tokenizer_hash: str) -> Plan:
    """Divide the files of a corpus into shards.

    A file is one document; a line of a `.jsonl` or `.jsonl.gz` file is one. Only `.jsonl` files
    are split.

    Args:
        corpus: files, folders, or the words `stdlib` and `site-packages`.
        options: options of the command.
        tokenizer_hash: `bytes`, or the SHA-256 of the tokenizer file.

    Raises:
        UserError: a path does not exist, or the corpus has no text.
        OSError: a file cannot be read.
    """
    files = [file for word in corpus for file in corpus_files(word, OPTION)]
    stats = [file.stat() for file in files]
    shards: list[list[Span]] = [[]]
    left = options.shard_bytes
    for file, stat in zip(files, stats, strict=True):
        for span in _spans(file, stat.st_size, options.shard_bytes):
            size = span.stop - span.start
            if shards[-1] and size > left:
                shards.append([])
                left = options.shard_bytes
            shards[-1].append(span)
            left -= size
    if not shards[0]:
        raise UserError(f"{', '.join(corpus)}: no text: correct {OPTION}")
    # Modification times detect files that change between two sessions.
    content = [
        [
            [str(file), stat.st_size, stat.st_mtime_ns]
            for file, stat in zip(files, stats, strict=True)
        ],
        asdict(options) | {"tokenizer": tokenizer_hash},
    ]
    return Plan(shards, hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _spans(file: Path, size: int, limit: int) -> Iterator[Span]:
    """Yield the spans of a file that are not empty."""
    step = limit if file.suffix == LINES else max(size, 1)
    for start in range(0, size, step):
        yield Span(str(file), start, min(start + step, size))


def read_span(span: Span, field: str) -> Iterator[bytes]:
    """Read the documents of a span; empty ones are skipped.

    Raises:
        UserError: a line is not a JSON object with text in `field`, or a compressed file is
            incomplete.
        OSError: the file cannot be read.
    """
    if span.path.endswith(COMPRESSED):
        try:
            with gzip.open(span.path, "rb") as file:
                yield from _lines(file, math.inf, field, span.path)
        except EOFError as error:
            raise UserError(f"{span.path}: incomplete: restore the file") from error
        return
    with open(span.path, "rb") as file:
        if not span.path.endswith(LINES):
            yield from filter(None, [file.read()])
            return
        if span.start:
            file.seek(span.start - 1)
            file.readline()  # the rest of a line of the span before
        yield from _lines(file, span.stop, field, span.path)


def _lines(file: IO[bytes] | gzip.GzipFile, stop: float, field: str, path: str) -> Iterator[bytes]:
    """Yield the documents of the lines that start before `stop`."""
    while (start := file.tell()) < stop and (line := file.readline()):
        if line.strip() and (document := _text_of(line, field, path, start)):
            yield document


def _text_of(line: bytes, field: str, path: str, start: int) -> bytes:
    try:
        text = json.loads(line)[field]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        raise UserError(
            f"{path}: the line at byte {start} must be a JSON object with text in {field!r}: "
            "correct it, or set --field"
        )
    return text.encode("utf-8", "surrogatepass")
