"""Folders of shards as the corpus of a run."""

import hashlib
import json
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader
from tokenizers import Tokenizer

from mc_core.errors import UserError
from train.config import TextConfig, WeightedCorpus
from train.data.documents import has_shards
from train.data.separator import Separator, choose_separator
from train.data.sources import Part, TextSource
from train.data.tokenizer_copy import describe, hash_of
from train.shards.manifest import Manifest, load_manifest
from train.shards.reader import TokenShards


def read_shards(config: TextConfig, tokenizer: Tokenizer | None) -> TextSource:
    """Open the shards of a run, and read the held-out text that it scores.

    Raises:
        UserError: a manifest is missing, a shard has changed, the corpus also has text, or the
            shards have another tokenizer, separator or split than the run.
    """
    folders = [Path(word) for word in config.corpus_paths]
    _check_only_shards(config, folders)
    manifests = [load_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        _check_manifest(config, folder, manifest)
        separator = _check_separator(config, folder, manifest, tokenizer)
    tokens = TokenShards(list(zip(folders, manifests, strict=True)))
    parts = _parts(config, manifests)
    held_out = [] if config.validation else _held_out(config, folders, manifests, parts)
    hashes = [[file.sha256 for file in manifest.shards] for manifest in manifests]
    content = json.dumps([hashes, [part.weight for part in parts if config.weighted]])
    return TextSource(
        tokens,
        parts,
        held_out,
        (
            sum(manifest.documents for manifest in manifests),
            sum(manifest.held_out.documents for manifest in manifests if manifest.held_out),
        ),
        separator,
        hashlib.sha256(content.encode()).hexdigest(),
    )


def _check_only_shards(config: TextConfig, folders: list[Path]) -> None:
    """Check that no part of the corpus is text."""
    for folder in folders:
        if folder.exists() and not has_shards(folder):
            needs = "weights need" if config.weighted else "the rest of data.corpus has"
            raise UserError(
                f"data.corpus = {folder}: not a folder of shards, and {needs} tokenized shards: "
                f"write it with mc tokenize {folder} --out FOLDER"
            )
    if config.train_bytes is not None:
        raise UserError(
            f"data.train_bytes = {config.train_bytes}: must be null for tokenized shards"
        )


def _check_manifest(config: TextConfig, folder: Path, manifest: Manifest) -> None:
    """Check that a folder of shards fits the data section of a run."""
    expected = hash_of(config.tokenizer) or "bytes"
    if manifest.tokenizer != expected:
        raise UserError(
            f"data.corpus = {folder}: tokenized with {describe(manifest.tokenizer)}, and "
            f"data.tokenizer = {config.tokenizer} is {describe(expected)}: use the same tokenizer "
            f"({folder / 'tokenizer.json' if manifest.tokenizer != 'bytes' else 'bytes'})"
        )
    if config.validation:
        return
    if manifest.held_out is None:
        raise UserError(
            f"data.corpus = {folder}: has no held-out documents: set data.validation to a file or "
            "folder of text"
        )
    if manifest.validation_fraction != config.validation_fraction:
        raise UserError(
            f"data.validation_fraction = {config.validation_fraction}: must be "
            f"{manifest.validation_fraction}, with which {folder} was written"
        )


def _check_separator(
    config: TextConfig, folder: Path, manifest: Manifest, tokenizer: Tokenizer | None
) -> Separator:
    """Return the separator of the run, which must be that of the shards."""
    separator = choose_separator(config.separator, tokenizer)
    written = choose_separator(manifest.separator, tokenizer)
    if written != separator:
        given = "null" if manifest.separator is None else repr(manifest.separator)
        raise UserError(
            f"data.separator: is {separator.description}, and {folder} was written with "
            f"{written.description}: set data.separator to {given}"
        )
    return separator


def _parts(config: TextConfig, manifests: list[Manifest]) -> tuple[Part, ...]:
    """Return the token ranges of the folders with their weights."""
    weights = [
        part.weight if isinstance(part, WeightedCorpus) else float(manifest.tokens)
        for part, manifest in zip(config.corpus, manifests, strict=True)
    ]
    parts, start = [], 0
    for manifest, weight in zip(manifests, weights, strict=True):
        parts.append(Part(start, start + manifest.tokens, weight))
        start += manifest.tokens
    return tuple(parts)


def _held_out(
    config: TextConfig, folders: list[Path], manifests: list[Manifest], parts: tuple[Part, ...]
) -> list[bytes]:
    """Return the first held-out documents of each folder, with its share of the scored bytes."""
    total = sum(part.weight for part in parts)
    documents = []
    for folder, manifest, part in zip(folders, manifests, parts, strict=True):
        assert manifest.held_out is not None
        reader = ArrayRecordReader(str(folder / manifest.held_out.name))
        limit = config.validation_bytes * part.weight / total
        size = 0
        for index in range(manifest.held_out.documents):
            if size >= limit:
                break
            documents.append(reader.read([index])[0])
            size += len(documents[-1])
        reader.close()
    return documents
