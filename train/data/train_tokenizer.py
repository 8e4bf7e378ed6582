"""`mc tokenizer train`: train a subword tokenizer on the text of a run, or on a corpus."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mc_core.errors import UserError
from mc_core.files import write_atomic
from mc_core.tables import counted
from train.config import TextConfig, TrainConfig
from train.data.documents import (
    clip,
    distinct,
    first_documents,
    is_held_out,
    read_documents,
    split,
)
from train.data.separator import END_OF_TEXT
from train.data.tokenizer import decode_utf8
from train.shards.plan import ShardOptions, make_plan, read_span

SPECIAL = END_OF_TEXT[0]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST = len(ALPHABET) + 1  # all bytes and the separator
MINIMUM = 1e-9  # held-out share for a rate, where all documents are used


class Trained(NamedTuple):
    """A trained tokenizer, and its rate on the held-out text."""

    tokenizer: Tokenizer
    tokens: int
    bytes_per_token: float


@dataclass(frozen=True)
class CorpusOptions:
    """Options of a tokenizer for a corpus.

    Attributes:
        vocab_size: maximum number of tokens.
        validation_fraction: share of the documents that is not used, as in `mc tokenize`.
        train_bytes: approximate maximum size of the text; documents are selected by hash.
        field: key of the text in the lines of a `.jsonl` file.
        scored_bytes: size of the held-out text on which the rate is measured.
    """

    vocab_size: int
    validation_fraction: float = 0.05
    train_bytes: int = 2**28
    field: str = "text"
    scored_bytes: int = 262_144


def train_for_config(config: TrainConfig, console: Console) -> Trained:
    """Train a tokenizer of `model.vocab_size` entries on the run's training text, and save it.

    The tokenizer is byte-level BPE: decoding returns every text. It has an end-of-text token, which
    the run inserts between documents by default. Only training documents are used, the last one of
    which reaches `data.train_bytes`. The same text gives the same file.

    Raises:
        UserError: the configuration names no new tokenizer file, the vocabulary is too small, or
            the text is missing or not UTF-8.
        OSError: the file cannot be written.
    """
    path = _target(config)
    data = config.data
    assert isinstance(data, TextConfig)
    start = time.monotonic()
    documents = distinct(read_documents(data.corpus_paths))
    training, held_out = split(documents, data.validation_fraction, data.window)
    used = first_documents(training, data.train_bytes)
    trained = train_bpe(used, held_out, config.model.vocab_size, data.validation_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, trained, used, start, console)
    return trained


def train_on_corpus(
    corpus: Sequence[str], path: Path, options: CorpusOptions, console: Console
) -> Trained:
    """Train a tokenizer on a corpus, and save it; see `train_for_config`.

    Documents that `mc tokenize` holds out are not used. The same text gives the same file.

    Args:
        corpus: files, folders, or the words `stdlib` and `site-packages`.
        path: the new file.
        options: size of the vocabulary and selection of the text.
        console: receives a summary.

    Raises:
        UserError: the file exists, the vocabulary is too small, or the text is missing or not
            UTF-8.
        OSError: a file cannot be read or written.
    """
    _check_new(path, "--out", "--vocab-size", options.vocab_size)
    start = time.monotonic()
    documents = distinct(select_documents(corpus, options))
    if not documents:
        raise UserError(f"{', '.join(corpus)}: no text: correct CORPUS")
    used, held_out = split(documents, options.validation_fraction or MINIMUM, 0)
    trained = train_bpe(used, held_out, options.vocab_size, options.scored_bytes)
    _save(path, trained, used, start, console)
    return trained


def select_documents(corpus: Sequence[str], options: CorpusOptions) -> Iterator[bytes]:
    """Read a corpus, and yield about `options.train_bytes` of it, selected by hash."""
    shards = ShardOptions(field=options.field)
    plan = make_plan(corpus, shards, "bytes")
    share = min(1.0, options.train_bytes / sum(plan.sizes))
    for spans in plan.shards:
        for span in spans:
            for document in read_span(span, options.field):
                # The last digits: the first ones decide whether a document is held out.
                digits = hashlib.sha256(document).hexdigest()[-16:]
                if is_held_out(digits, share) or share == 1.0:
                    yield document


def _save(path: Path, trained: Trained, used: list[bytes], start: float, console: Console) -> None:
    """Write the tokenizer, and print a summary."""
    write_atomic(path, trained.tokenizer.to_str().encode())
    console.print(
        f"{path}: {trained.tokens:,} tokens, trained on {sum(map(len, used)):,} bytes "
        f"of {counted(len(used), 'document')} in {time.monotonic() - start:.0f} s; "
        f"{trained.bytes_per_token:.3f} bytes per token of the held-out text",
        soft_wrap=True,
        highlight=False,
    )


def _target(config: TrainConfig) -> Path:
    """Return the path of the new file.

    Raises:
        UserError: the configuration names no new tokenizer file, or the vocabulary is too small.
    """
    data = config.data
    if not isinstance(data, TextConfig):
        raise UserError(f"data.task = {data.task!r}: mc tokenizer train needs text")
    if data.tokenizer == "bytes":
        raise UserError("data.tokenizer = bytes: set it to the path of the new tokenizer.json")
    path = Path(data.tokenizer)
    _check_new(path, "data.tokenizer", "model.vocab_size", config.model.vocab_size)
    return path


def _check_new(path: Path, option: str, size_option: str, vocab_size: int) -> None:
    """Check the path of the new file and the size of the vocabulary."""
    if path.exists():
        raise UserError(f"{option} = {path}: already exists: delete it, or set another path")
    if vocab_size < SMALLEST:
        raise UserError(
            f"{size_option} = {vocab_size}: must be >= {SMALLEST}: all bytes and {SPECIAL}"
        )


def train_bpe(
    documents: list[bytes], held_out: list[bytes], vocab_size: int, limit: int
) -> Trained:
    """Train a byte-level BPE tokenizer, and measure its rate.

    Args:
        documents: training documents, in UTF-8.
        held_out: documents on which the rate is measured.
        vocab_size: maximum number of entries; fewer if the text has fewer merges.
        limit: maximum number of held-out bytes.

    Raises:
        UserError: a document is not UTF-8.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SPECIAL],
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(decode_utf8, documents), trainer)
    text = clip(b"\n".join(first_documents(held_out, limit)), limit)
    count = len(tokenizer.encode(decode_utf8(text)).ids)
    return Trained(tokenizer, tokenizer.get_vocab_size(), len(text) / count)
