"""A model's tokenizer as files for transformers, which tasks with generated texts need."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from mc_core.files import write_atomic
from train.data.hf_tokenizer import byte_tokenizer


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
