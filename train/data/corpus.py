"""Corpora: training tokens, and the held-out text and its tokens."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mc_core.errors import UserError
from train.config import TextConfig
from train.data.documents import (
    clip,
    distinct,
    first_documents,
    has_shards,
    read_documents,
    split,
)
from train.data.round_trip import RoundTrip, check_round_trip
from train.data.separator import NO_SEPARATOR, Joined, Separator, choose_separator
from train.data.sources import Part, TextSource, Tokens
from train.data.tokenizer import Encode, decode_utf8, load_tokenizer, make_encoder, tokenize
from train.shards.corpus import read_shards


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    Attributes:
        train: [tokens], the concatenated training documents; of shards, read on demand.
        validation: the concatenated held-out documents.
        encode: function from text to tokens.
        documents: numbers of training and held-out documents, distinct ones if they are text.
        fingerprint: hash of the training tokens and the held-out text.
        separator: separator between documents, in both splits.
        borders: positions of separator tokens in `validation`.
        tokenizer: tokenizer of the text; None for bytes.
        parts: parts of `train` with their own weights; empty for a single part.
    """

    train: Tokens
    validation: bytes
    encode: Encode
    documents: tuple[int, int]
    fingerprint: str
    separator: Separator = NO_SEPARATOR
    borders: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None
    parts: tuple[Part, ...] = ()

    def validation_tokens(self, limit: int | None = None) -> np.ndarray:
        """Return the tokens of the first `limit` bytes of the validation text."""
        joined = Joined(clip(self.validation, limit), self.borders)
        return encode_joined(joined, self.separator, self.encode)

    @cached_property
    def round_trip(self) -> RoundTrip | None:
        """Encoding losses on the validation text; None for bytes."""
        return round_trip(Joined(self.validation, self.borders), self.tokenizer)


def load_corpus(config: TextConfig, vocab_size: int) -> Corpus:
    """Read and encode text, or open tokenized shards.

    Raises:
        UserError: a file is missing, empty or not text, there is too little text, the shards do
            not belong to the run, or the tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    encode = make_encoder(tokenizer)
    others = distinct(read_documents(config.validation, "data.validation"))
    if config.weighted or any(has_shards(Path(word)) for word in config.corpus_paths):
        source = read_shards(config, tokenizer)
    else:
        source = _read_text(config, tokenizer, others)
    joined = source.separator.join(list(others.values()) or source.held_out)
    text = clip(joined.text, config.validation_bytes)
    for start, stop, _ in source.parts or (Part(0, len(source.tokens), 1.0),):
        if stop - start <= config.window:
            raise UserError(
                f"data.corpus = {', '.join(config.corpus_paths)}: {stop - start} tokens to train "
                f"on, and data.window = {config.window} needs at least {config.window + 1}: give "
                "more text or a smaller window"
            )
    return Corpus(
        source.tokens,
        text,
        encode,
        (source.documents[0], len(others) or source.documents[1]),
        f"{source.digest}-{hashlib.sha256(text).hexdigest()}",
        source.separator,
        joined.borders,
        tokenizer,
        source.parts,
    )


def _read_text(
    config: TextConfig, tokenizer: Tokenizer | None, others: dict[str, bytes]
) -> TextSource:
    """Read and encode text.

    Args:
        config: data of the run.
        tokenizer: its tokenizer; None for bytes.
        others: documents of `data.validation` by SHA-256, which are not trained on; if there are
            none, a share of the corpus is held out.
    """
    separator = choose_separator(config.separator, tokenizer)
    documents = distinct(read_documents(config.corpus_paths))
    train = [text for digest, text in documents.items() if digest not in others]
    held_out: list[bytes] = []
    if not others:
        train, held_out = split(documents, config.validation_fraction, config.window)
    joined = separator.join(first_documents(train, config.train_bytes))
    joined = joined._replace(text=clip(joined.text, config.train_bytes))
    tokens = encode_joined(joined, separator, make_encoder(tokenizer))
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return TextSource(tokens, (), held_out, (len(train), len(held_out)), separator, digest)


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
