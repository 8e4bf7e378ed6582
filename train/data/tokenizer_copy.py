"""A run's copy of its tokenizer file: written at the start, checked when read."""

import dataclasses
import hashlib
from pathlib import Path

from mc_core.errors import UserError
from mc_core.files import write_atomic
from mc_core.pretrained import read_tokenizer as read_file_tokenizer
from train.config import TrainConfig
from train.config.recall_schema import MQARConfig
from train.data.tokenizer import read_tokenizer

FILE = "tokenizer.json"


def hash_of(tokenizer: str) -> str | None:
    """Return the SHA-256 of a tokenizer file, or None for the word `bytes`.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_tokenizer(tokenizer)
    return None if content is None else hashlib.sha256(content).hexdigest()


def tokenizer_hash(config: TrainConfig) -> str | None:
    """Return the SHA-256 of a run's tokenizer file; None where a run has none.

    Raises:
        UserError: the file cannot be read.
    """
    return None if isinstance(config.data, MQARConfig) else hash_of(config.data.tokenizer)


def copy_tokenizer(directory: Path, config: TrainConfig) -> None:
    """Copy a run's tokenizer file into the run directory, which is created if missing.

    Raises:
        UserError: the file cannot be read.
        OSError: the copy cannot be written.
    """
    content = None if isinstance(config.data, MQARConfig) else read_tokenizer(config.data.tokenizer)
    copy = directory / FILE
    if content is None or (copy.is_file() and copy.read_bytes() == content):
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(copy, content)


def prefer_copy(config: TrainConfig, directory: Path) -> TrainConfig:
    """Return the configuration with the tokenizer copy of the run directory, if there is one."""
    copy = directory / FILE
    if isinstance(config.data, MQARConfig) or config.data.tokenizer == "bytes":
        return config
    return _with_tokenizer(config, str(copy)) if copy.is_file() else config


def with_tokenizer_copy(
    config: TrainConfig, directory: Path, sha256: str | None, given: str | None = None
) -> TrainConfig:
    """Return a run's configuration with the tokenizer copy of the run directory.

    Without a copy, the tokenizer of the configuration is used.

    Args:
        config: configuration of the run.
        directory: run directory, which may have been moved.
        sha256: hash of the tokenizer file, from the checkpoint; None for bytes, and for runs of
            versions without copies.
        given: tokenizer from the command line; must have the same content.

    Raises:
        UserError: the file is missing, or is not the one that the run was trained with.
    """
    if isinstance(config.data, MQARConfig):
        return config
    name = config.data.tokenizer
    copy = directory / FILE
    if given is not None:
        expected = "bytes" if name == "bytes" else sha256
        check_same_tokenizer(f"--tokenizer {given}", hash_of(given) or "bytes", expected, directory)
        name = given
    elif sha256 is not None:
        if not copy.is_file():
            raise UserError(
                f"{copy}: no such file: this is the run's copy of data.tokenizer = {name} "
                f"(SHA-256 {sha256[:12]}): restore it"
            )
        check_same_tokenizer(str(copy), hash_of(str(copy)), sha256, directory)
        name = str(copy)
    elif name != "bytes" and not Path(name).is_file():
        raise UserError(
            f"{directory}: data.tokenizer = {name}: no such file, and the run has no copy of it: "
            "restore the file"
        )
    return _with_tokenizer(config, name)


def _with_tokenizer(config: TrainConfig, name: str) -> TrainConfig:
    assert not isinstance(config.data, MQARConfig)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def tokenizer_of_file(source: Path, vocab_size: int, given: str | None) -> str:
    """Return the tokenizer of a safetensors file: `bytes`, or the path from the command line.

    Args:
        source: weight file.
        vocab_size: vocabulary size of its model.
        given: `bytes` or a path from the command line, if any.

    Raises:
        UserError: the tokenizer is unknown, or differs from `given`.
        OSError: a file cannot be read.
    """
    known = read_file_tokenizer(source)
    if given is not None:
        if known is not None:
            found = hash_of(given) or "bytes"
            check_same_tokenizer(f"--tokenizer {given}", found, known, source)
        return given
    if known not in (None, "bytes") or (known is None and vocab_size != 256):
        says = f"declares only its {describe(known)}" if known else "does not declare its tokenizer"
        raise UserError(
            f"{source}: has {vocab_size} tokens, and {says}: pass the tokenizer.json with "
            "--tokenizer, or --tokenizer bytes"
        )
    return "bytes"


def check_readable(config: TrainConfig) -> None:
    """Check that the tokenizer file of a run exists.

    Raises:
        UserError: the file does not exist; the message has the path of the run's copy, if any.
    """
    if isinstance(config.data, MQARConfig):
        return
    name, copy = config.data.tokenizer, Path(config.run.directory) / FILE
    if name != "bytes" and not Path(name).exists() and copy.is_file():
        raise UserError(
            f"data.tokenizer = {name}: no such file; the run has a copy: set data.tokenizer={copy}"
        )


def check_same_tokenizer(
    what: str, found: str | None, expected: str | None, source: Path | str
) -> None:
    """Check the hash of a tokenizer, or `bytes`, against that of a model.

    Args:
        what: name of the tokenizer in the message.
        found: hash of the tokenizer, or `bytes`.
        expected: hash of the model's tokenizer, or `bytes`; None disables the check.
        source: name of the model in the message.

    Raises:
        UserError: the tokenizers differ.
    """
    if expected is not None and found != expected:
        raise UserError(
            f"{what} ({describe(found)}) is not the tokenizer that {source} was trained with "
            f"({describe(expected)}): use that file"
        )


def describe(tokenizer: str | None) -> str:
    """Return a shortened SHA-256, or `bytes`."""
    return "bytes" if tokenizer in (None, "bytes") else f"SHA-256 {str(tokenizer)[:12]}"
