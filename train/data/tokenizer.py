"""Tokenizers: loaded from a file, and functions from text to tokens."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from mc_core.errors import UserError

Encode = Callable[[bytes], np.ndarray]


def load_encoder(tokenizer: str, vocab_size: int) -> Encode:
    """Return the function from text to tokens.

    Raises:
        UserError: the tokenizer file cannot be read, or has more tokens than the model.
    """
    return make_encoder(load_tokenizer(tokenizer, vocab_size))


def load_tokenizer(tokenizer: str, vocab_size: int) -> Tokenizer | None:
    """Load a tokenizer file; return None for the word `bytes`.

    Truncation, padding, the special tokens of the post-processor and BPE dropout, which a file may
    contain from fine-tuning, are disabled, so that encoding is deterministic and complete.

    Raises:
        UserError: the tokenizer file cannot be read, or has no tokens or more than the model.
    """
    content = read_tokenizer(tokenizer)
    if content is None:
        return None
    try:
        loaded = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"data.tokenizer = {tokenizer}: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    loaded.post_processor = None
    if getattr(loaded.model, "dropout", None) is not None:
        loaded.model.dropout = None
    if not loaded.get_vocab():
        raise UserError(f"data.tokenizer = {tokenizer}: has no tokens")
    size = max(loaded.get_vocab().values()) + 1
    if size > vocab_size:
        raise UserError(f"model.vocab_size = {vocab_size}: {tokenizer} needs at least {size}")
    return loaded


def read_tokenizer(tokenizer: str) -> bytes | None:
    """Return the content of a tokenizer file, or None for the word `bytes`.

    Raises:
        UserError: the file cannot be read.
    """
    if tokenizer == "bytes":
        return None
    try:
        return Path(tokenizer).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"data.tokenizer = {tokenizer}: {reason}: must be a tokenizer.json"
        ) from error


def make_encoder(tokenizer: Tokenizer | None, option: str = "data.corpus") -> Encode:
    """Return the function from text to tokens; tokens are bytes if there is no tokenizer.

    `option` is the source of the text in error messages.
    """
    if tokenizer is None:
        return lambda text: np.frombuffer(text, np.uint8)
    size = max(tokenizer.get_vocab().values()) + 1

    def encode(text: bytes) -> np.ndarray:
        ids = tokenize(tokenizer, decode_utf8(text, option)).ids
        return np.asarray(ids, np.uint16 if size <= 2**16 else np.int32)

    return encode


def decode_utf8(text: bytes, option: str = "data.corpus") -> str:
    """Decode UTF-8 text; `option` is its source in error messages.

    Raises:
        UserError: the text is not UTF-8.
    """
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: {error}: a tokenizer needs UTF-8 text") from error


def tokenize(tokenizer: Tokenizer, text: str) -> Encoding:
    """Return the tokens of a text and their positions.

    Raises:
        UserError: the tokenizer has no token for a part of the text.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"data.tokenizer: cannot encode the text: {error}") from error
