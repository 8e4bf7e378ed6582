"""`mc tokenize`: train the subword tokenizer that the configuration of a text run names."""

import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mc_core.errors import UserError
from mc_core.files import write_atomic
from train.config import TextConfig, TrainConfig
from train.data.corpus import clip, distinct, first_documents, read_documents, split
from train.data.separator import END_OF_TEXT
from train.data.tokenizer import decode_utf8

SPECIAL = END_OF_TEXT[0]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SMALLEST = len(ALPHABET) + 1  # all bytes and the separator


class Trained(NamedTuple):
    """A trained tokenizer, and its rate on the held-out text."""

    tokenizer: Tokenizer
    tokens: int
    bytes_per_token: float


def tokenize(config: TrainConfig, console: Console) -> Trained:
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
    documents = distinct(read_documents(data.corpus))
    training, held_out = split(documents, data.validation_fraction, data.window)
    used = first_documents(training, data.train_bytes)
    trained = train_bpe(used, held_out, config.model.vocab_size, data.validation_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, trained.tokenizer.to_str().encode())
    console.print(
        f"{path}: {trained.tokens:,} tokens, trained on {sum(map(len, used)):,} bytes "
        f"of {len(used):,} documents in {time.monotonic() - start:.0f} s; "
        f"{trained.bytes_per_token:.3f} bytes per token of the held-out text",
        soft_wrap=True,
        highlight=False,
    )
    return trained


def _target(config: TrainConfig) -> Path:
    """Return the path of the new file.

    Raises:
        UserError: the configuration names no new tokenizer file, or the vocabulary is too small.
    """
    data = config.data
    if not isinstance(data, TextConfig):
        raise UserError(f"data.task = {data.task!r}: mc tokenize needs text")
    if data.tokenizer == "bytes":
        raise UserError("data.tokenizer = bytes: set it to the path of the new tokenizer.json")
    path = Path(data.tokenizer)
    if path.exists():
        raise UserError(f"data.tokenizer = {path}: already exists: delete it, or set another path")
    if config.model.vocab_size < SMALLEST:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: must be >= {SMALLEST}: all bytes and "
            f"{SPECIAL}"
        )
    return path


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
