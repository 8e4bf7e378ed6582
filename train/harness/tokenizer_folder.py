"""A model's tokenizer as files for transformers, which tasks with generated texts need."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mc_core.files import write_atomic


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer of single bytes, in which the id of a token is its byte."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [chr(i) for i in range(256) if chr(i) in alphabet]
    # Bytes without a printable character of the same code are mapped, in order, to 256, 257, ...
    others = (chr(256 + n) for n in range(256))
    vocabulary = {chr(i) if chr(i) in printable else next(others): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> Path:
    """Write files that `AutoTokenizer` loads, and return their folder.

    Args:
        folder: an existing folder.
        tokenizer: tokenizer of the model; None = bytes.
    """
    (byte_tokenizer() if tokenizer is None else tokenizer).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_atomic(folder / "tokenizer_config.json", (json.dumps(config) + "\n").encode())
    return folder
