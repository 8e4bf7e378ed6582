"""Corpora: documents from files, the split into training and validation text, and their tokens."""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mc_core.errors import UserError
from train.config import TextConfig
from train.data.round_trip import RoundTrip, check_round_trip
from train.data.separator import NO_SEPARATOR, Joined, Separator, choose_separator
from train.data.tokenizer import Encode, decode_utf8, load_tokenizer, make_encoder, tokenize

# Tests are mostly data; the others differ between installations of one version.
STDLIB_WITHOUT = {"test", "tests", "idlelib", "site-packages", "dist-packages"}
STDLIB_WITHOUT_PREFIX = ("_sysconfigdata", "config-", "__editable__")


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        train: [tokens], the concatenated training documents.
        validation: the concatenated held-out documents.
        encode: function from text to tokens.
        documents: numbers of distinct training and held-out documents.
        fingerprint: hash of the training tokens and the held-out text.
        separator: separator between documents, in both splits.
        borders: positions of separator tokens in `validation`.
        tokenizer: tokenizer of the text; None for bytes.
    """

    train: np.ndarray
    validation: bytes
    encode: Encode
    documents: tuple[int, int]
    fingerprint: str
    separator: Separator = NO_SEPARATOR
    borders: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None

    def validation_tokens(self, limit: int | None = None) -> np.ndarray:
        """Return the tokens of the first `limit` bytes of the validation text."""
        joined = Joined(clip(self.validation, limit), self.borders)
        return encode_joined(joined, self.separator, self.encode)

    @cached_property
    def round_trip(self) -> RoundTrip | None:
        """Encoding losses on the validation text; None for bytes."""
        return round_trip(Joined(self.validation, self.borders), self.tokenizer)


def load_corpus(config: TextConfig, vocab_size: int) -> Corpus:
    """Read, split and encode the text.

    Raises:
        UserError: a file is missing, empty or not text, there is too little text, or the
            tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    encode, separator = make_encoder(tokenizer), choose_separator(config.separator, tokenizer)
    documents = distinct(read_documents(config.corpus))
    train, validation = split(documents, config.validation_fraction, config.window)
    held_out = separator.join(validation)
    text = clip(held_out.text, config.validation_bytes)
    joined = separator.join(first_documents(train, config.train_bytes))
    joined = joined._replace(text=clip(joined.text, config.train_bytes))
    tokens = encode_joined(joined, separator, encode)
    if len(tokens) <= config.window:
        raise UserError(
            f"data.corpus = {', '.join(config.corpus)}: {len(tokens)} tokens to train on, and "
            f"data.window = {config.window} needs at least {config.window + 1}: "
            "give more text or a smaller window"
        )
    sums = [hashlib.sha256(part).hexdigest() for part in (tokens.tobytes(), text)]
    return Corpus(
        tokens,
        text,
        encode,
        (len(train), len(validation)),
        "-".join(sums),
        separator,
        held_out.borders,
        tokenizer,
    )


def encode_joined(joined: Joined, separator: Separator, encode: Encode) -> np.ndarray:
    """Return the tokens of documents and of the separators between them.

    If the separator is a token, each document is encoded separately, like a prompt. Otherwise
    the text is encoded in one call, so that tokens do not depend on how it is split.
    """
    if separator.token is None:
        return encode(joined.text)
    first, *others = (encode(part) for part in _parts(joined))
    border = np.array([separator.token], first.dtype)
    return np.concatenate([first, *(x for other in others for x in (border, other))])


def round_trip(joined: Joined, tokenizer: Tokenizer | None) -> RoundTrip | None:
    """Return the encoding losses of a text; None for bytes.

    Raises:
        UserError: the text is not UTF-8, or has no tokens.
    """
    if tokenizer is None:
        return None
    texts = [decode_utf8(part) for part in _parts(joined)]
    return check_round_trip(tokenizer, texts, lambda text: tokenize(tokenizer, text).ids)


def _parts(joined: Joined) -> list[bytes]:
    """Split joined text at its separator tokens."""
    size = len(joined.text)
    places = [0, *(place for place in joined.borders if place < size), size]
    return [joined.text[start:end] for start, end in pairwise(places)]


def read_documents(corpus: Iterable[str], option: str = "data.corpus") -> Iterator[bytes]:
    """Read the files of a corpus; empty files inside folders are skipped.

    Args:
        corpus: files, folders, or words of `NAMED`.
        option: name of the option that lists them, for error messages.

    Raises:
        UserError: a path does not exist, or is an empty file or folder.
        OSError: a file cannot be read.
    """
    for word in corpus:
        path = Path(word)
        if word in NAMED:
            yield from filter(None, map(Path.read_bytes, NAMED[word]()))
        elif path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if _is_visible_file(file, path)]
            documents = list(filter(None, map(Path.read_bytes, files)))
            if not documents:
                raise UserError(f"{word}: no file with text in this folder: use another")
            yield from documents
        elif not path.exists():
            raise UserError(f"{word}: no such file or folder: correct {option}")
        else:
            document = path.read_bytes()
            if not document:
                raise UserError(f"{word}: the file is empty: remove it from {option}")
            yield document


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
    count = sum(int(digest[:16], 16) < fraction * 2**64 for digest in documents)
    count = min(max(count, 1), len(texts) - 1)
    return texts[count:], texts[:count]


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
