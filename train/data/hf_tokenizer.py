"""Tokenizer files of Hugging Face transformers, for a model of bytes or of a tokenizer file."""

from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mc_core.files import to_json
from train.data.separator import choose_separator, prefix_token
from train.data.tokenizer import load_tokenizer, read_tokenizer
from train.data.tokenizer_copy import FILE

SETTINGS_FILE = "tokenizer_config.json"


def byte_characters() -> list[str]:
    """Return the character that stands for each byte in byte-level tokenizers, by byte.

    A byte that is a printable character of Latin-1 stands for itself. The others are characters
    from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer in which the id of a token is its byte."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class TokenizerFiles(NamedTuple):
    """Content of the files that `AutoTokenizer.from_pretrained` reads, by name."""

    files: dict[str, bytes]
    padding: int | None = None  # id of the padding token; None: the tokenizer has no special token
    prefix: int | None = None  # id of the token before texts without a context; see `prefix_token`


def tokenizer_files(
    tokenizer: str, vocab_size: int, separator: str | None = None
) -> TokenizerFiles:
    """Return the files of a tokenizer that encodes as in training.

    Models ignore ids at padding, so any token can be the padding token: byte 0, or the first
    special token of a tokenizer file. The end-of-text token is the token between documents, if it
    is a special token; otherwise the padding token, as some programs need one.

    Args:
        tokenizer: `bytes`, or the path of a tokenizer file.
        vocab_size: vocabulary size of the model.
        separator: `data.separator` of the run.

    Raises:
        UserError: the tokenizer file cannot be read, or has more tokens than the model.
    """
    content, loaded = read_tokenizer(tokenizer), load_tokenizer(tokenizer, vocab_size)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    padding: int | None = 0
    between = choose_separator(separator, loaded)
    prefix = prefix_token(between, loaded)
    if content is None or loaded is None:
        loaded = byte_tokenizer()
        content = loaded.to_str(pretty=True).encode()
        # Otherwise, U+0100 in a text, which is the name of byte 0, would be read as padding.
        settings["split_special_tokens"] = True
    else:
        special = (id_ for id_, token in loaded.get_added_tokens_decoder().items() if token.special)
        padding = min(special, default=None)
        if Tokenizer.from_buffer(content).to_str() != loaded.to_str():
            content = loaded.to_str(pretty=True).encode()
    if padding is not None:
        settings["pad_token"] = settings["eos_token"] = loaded.id_to_token(padding)
    if between.token is not None:
        settings["eos_token"] = between.name
    files = {FILE: content, SETTINGS_FILE: to_json(settings, 2).encode()}
    return TokenizerFiles(files, padding, prefix)
