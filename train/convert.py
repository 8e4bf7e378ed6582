"""Conversion of weights between runs and files.

Requires both frameworks, because conversions are verified in both.
"""

from functools import partial
from pathlib import Path

from rich.console import Console

from mc_core.errors import UserError
from mc_core.pretrained import Config, read_tokenizer
from mc_core.weights import Flat
from parity import convert as between
from parity.community import community_format
from parity.files import SAFETENSORS, STATE_DICT, Format, ModuleWeights, write_safetensors
from parity.hf import folder_tokenizer, hf_format, is_folder
from parity.weights import jax_weights, load_jax
from train.checkpoint import Checkpoints, Meta, load_run, run_tokenizer
from train.config import TrainConfig, to_dict
from train.config.recall_schema import MQARConfig
from train.data.tokenizer_copy import (
    FILE,
    check_same_tokenizer,
    copy_tokenizer,
    hash_of,
    tokenizer_hash,
)
from train.step import build, merge, split
from train.tasks.task import load_task

SUFFIXES = {".safetensors": "safetensors", ".pt": "torch", ".pth": "torch"}


def convert(
    source: Path,
    target: Path,
    source_format: str | None,
    target_format: str | None,
    config: TrainConfig | None,
    console: Console,
) -> between.Proof:
    """Convert weights, and print the result of the verification.

    Args:
        source: run directory, folder of transformers, or weight file.
        target: path to write; must not exist.
        source_format: `run`, `safetensors`, `torch`, `hf` or `community`; None = inferred from the
            path.
        target_format: `run`, `safetensors` or `torch`; None = inferred from the path.
        config: configuration of a new run, or of a `state_dict` without configuration.
        console: receives the result.

    Raises:
        UserError: a path, a format, the weights or the configuration are invalid, or the
            verification fails. Nothing is written in these cases.
        OSError: a file cannot be read or written.
    """
    notes: list[str] = []
    community = community_format(notes.append)
    formats = {
        form.name: form
        for form in (run_format(config), SAFETENSORS, STATE_DICT, hf_format(), community)
    }
    read = formats[source_format or _format_of(source)]
    write = formats[target_format or _format_of(target)]
    if write.name == "run" and config is None:
        raise UserError(f"{target}: a new run needs --config")
    named = tokenizer_of(source, read.name)
    if write.name == "safetensors":
        write = write._replace(write=partial(write_safetensors, tokenizer=named))
    if write.name == "run" and config is not None and not isinstance(config.data, MQARConfig):
        found = hash_of(config.tokenizer) or "bytes"
        check_same_tokenizer(f"data.tokenizer = {config.tokenizer}", found, named, source)
    try:
        proof = between.convert(source, target, read, write, config.model if config else None)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    if read.name == "run" and (source / FILE).is_file():
        notes.append(f"{target.name} does not contain the tokenizer: keep {source / FILE}")
    console.print(
        f"{source} ({read.name}) -> {target} ({write.name}): {proof.parameters} parameters of "
        f"{proof.dtype}, bit-equal; outputs of JAX and PyTorch in float64 differ by "
        f"{proof.distance:.1e} (relative RMS){''.join('; ' + note for note in notes)}",
        soft_wrap=True,
        highlight=False,
    )
    return proof


def tokenizer_of(source: Path, source_format: str) -> str | None:
    """Return `bytes` or the SHA-256 of the tokenizer file of a source; None if unknown."""
    if not source.exists():
        return None
    if source_format == "safetensors":
        try:
            return read_tokenizer(source)
        except ValueError as error:
            raise UserError(str(error)) from error
    if source_format == "hf":
        return folder_tokenizer(source)
    return run_tokenizer(source) if source_format == "run" else None


def run_format(config: TrainConfig | None) -> Format:
    """Return the format of run directories; `config` is the configuration of a written run."""

    def write(path: Path, model: Config, flat: Flat) -> None:
        assert config is not None
        assert model == config.model
        write_run(path, config, flat)

    return Format("run", "jax", read_run, write)


def read_run(path: Path) -> ModuleWeights:
    """Return the parameters of a run's last checkpoint."""
    config, model, *_ = load_run(path, needs_text=False)
    return ModuleWeights(config.model, jax_weights(model), "jax")


def write_run(path: Path, config: TrainConfig, flat: Flat) -> None:
    """Write a run at step 0 with these parameters."""
    task = load_task(config)
    graphdef, state, _ = build(config)
    model = merge(graphdef, state.params, state.rest)
    load_jax(model, flat)
    state = state._replace(params=split(model)[1])
    copy_tokenizer(path, config)
    meta = Meta(to_dict(config), task.fingerprint, 0.0, tokenizer=tokenizer_hash(config))
    with Checkpoints(path) as checkpoints:
        checkpoints.save(0, state, task.batches(), meta)


def _format_of(path: Path) -> str:
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    if is_folder(path):
        return "hf"
    if path.is_dir() or not (path.exists() or path.suffix):
        return "run"
    raise UserError(
        f"{path}: unknown format; must be a run directory, a folder of transformers, a "
        ".safetensors or a .pt file, "
        "or give --from or --to"
    )
