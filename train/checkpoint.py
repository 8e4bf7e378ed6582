"""Checkpoints: parameters, optimiser, random state, data position, step and configuration."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax  # before grain, which does no more than warn where it is missing

# isort: split
import grain
import orbax.checkpoint as ocp
from flax import nnx
from grain.checkpoint import CheckpointRestore, CheckpointSave

from mc_core.errors import UserError
from mc_jax import LanguageModel
from train.config import TextConfig, TrainConfig, first_difference, from_dict, to_dict
from train.data.tokenizer_copy import FILE, describe, with_kept_tokenizer
from train.step import TrainState, build


class Meta(NamedTuple):
    """Description of a checkpoint: plain values, saved as JSON."""

    config: dict[str, Any]
    fingerprint: str  # of the data
    seconds: float  # of training, over all sessions
    grown: Sequence[Sequence[int]] = ()  # [step, run.steps from there on], where run.steps grew
    tokenizer: str | None = None  # SHA-256 of the tokenizer file, of which the run keeps a copy


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is written to a temporary folder and then renamed, so an interrupted process leaves
    complete checkpoints only. Older ones are deleted afterwards.
    """

    def __init__(self, run: Path, keep: int | None = None):
        self.directory = (run / "checkpoints").resolve()
        self.run = run
        self._keep = keep
        self._open: ocp.CheckpointManager | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._open:
            self._open.close()

    @property
    def _manager(self) -> ocp.CheckpointManager:
        # Opening makes the directory, so it waits until there is something to read or write.
        if self._open is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, enable_async_checkpointing=False
            )
            self._open = ocp.CheckpointManager(self.directory, options=options)
        return self._open

    def latest(self) -> int | None:
        """Return the last saved step, or None."""
        return self._manager.latest_step() if self.directory.is_dir() else None

    def meta(self, step: int) -> Meta:
        """Return the description of a step's checkpoint.

        Raises:
            UserError: it cannot be read, or is of another version.
        """
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        found = self._restore(step, args).meta
        try:
            return Meta(**found)
        except TypeError as error:
            raise _other_version(self.run, error) from error

    def save(
        self, step: int, state: TrainState, batches: grain.DatasetIterator, meta: Meta
    ) -> None:
        """Save the state after `step` steps and the position of the data.

        Raises:
            UserError: it cannot be written; the checkpoints before it stay.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)),
            data=CheckpointSave(batches),
            meta=ocp.args.JsonSave(meta._asdict()),
        )
        last = self.latest() or 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _check_disk_space(self.directory, state)
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # storage fails as OSError, ValueError, groups of them, ...
            raise UserError(
                f"{self.run}: cannot save the checkpoint of step {step} ({_reason(error)}); "
                f"free disk space and run the same command: it resumes from step {last}"
            ) from error

    def restore(
        self, step: int, like: TrainState, batches: grain.DatasetIterator | None = None
    ) -> TrainState:
        """Return the state after `step` steps, shaped `like`, and set the position of `batches`.

        Raises:
            UserError: it cannot be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract)}
        if batches is not None:
            items["data"] = CheckpointRestore(batches)
        restored = self._restore(step, ocp.args.Composite(**items))
        return TrainState(**restored.state)

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.directory / str(step)}: cannot be read ({_reason(error)}); "
                "delete it to go back to the checkpoint before"
            ) from error


def check_same_run(directory: Path, saved: Meta, now: Meta, *, may_grow: bool = False) -> None:
    """Compare a checkpoint with the configuration and the text that are to continue it.

    Args:
        directory: of the run.
        saved: the checkpoint's description.
        now: the description of the run that is to continue.
        may_grow: `run.steps` may be larger than it was; otherwise it must never have grown.

    Raises:
        UserError: names the first key that differs.
    """
    # Through the configuration, so that a key newer than the checkpoint has its default.
    before = _with_free_values(to_dict(_config_of(directory, saved)), saved, now)
    old_steps, steps = before["run"]["steps"], now.config["run"]["steps"]
    if may_grow:
        if steps < old_steps:
            raise UserError(
                f"{directory} holds a checkpoint of run.steps = {old_steps}, and it is {steps}: "
                "run.steps may grow but not shrink; change it back, or set another run.directory"
            )
        before["run"]["steps"] = steps
    difference = first_difference(before, now.config)
    if difference:
        key, old, new = difference
        raise UserError(
            f"{directory} holds a checkpoint of another config: {key} was {old!r} and is {new!r}; "
            "change it back, or set another run.directory"
        )
    if saved.tokenizer != now.tokenizer and saved.tokenizer is not None:
        path = now.config["data"]["tokenizer"]
        raise UserError(
            f"{directory} was trained with {directory / FILE} ({describe(saved.tokenizer)}), and "
            f"data.tokenizer = {path} is another file ({describe(now.tokenizer)}): name "
            "the run's, or set another run.directory"
        )
    if saved.fingerprint != now.fingerprint:
        older = "separator" not in saved.config["data"]
        hint = ", or documents had nothing between them, as data.separator='' says" if older else ""
        raise UserError(
            f"{directory} holds a checkpoint of other text: what data.corpus names has "
            f"changed{hint}; bring it back, or set another run.directory"
        )
    if saved.grown and not may_grow:
        raise UserError(
            f"{directory} holds a checkpoint of a run that was extended at step "
            f"{saved.grown[0][0]}: its learning rates differ from those of this config; "
            "delete it, or set another directory"
        )


def _with_free_values(before: dict[str, Any], saved: Meta, now: Meta) -> dict[str, Any]:
    """Return a checkpoint's configuration with the new values of keys that may differ.

    The same tokenizer may have another path. A checkpoint from before `data.separator` does not
    name its separator: the text's fingerprint decides.
    """
    data = dict(before["data"])
    if saved.tokenizer is not None and saved.tokenizer == now.tokenizer:
        data["tokenizer"] = now.config["data"].get("tokenizer")
    if "separator" not in saved.config["data"]:
        data["separator"] = now.config["data"].get("separator")
    return before | {"data": data}


def load_state(directory: Path) -> tuple[TrainConfig, nnx.GraphDef, TrainState, int, Meta]:
    """Return configuration, structure, state, step and description of a run's last checkpoint.

    Raises:
        UserError: there is none, it cannot be read, or it is of another version.
    """
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{directory}: no checkpoint here; name the folder of a run")
        meta = checkpoints.meta(step)
        config = _config_of(directory, meta)
        graphdef, like, _ = build(config)
        state = checkpoints.restore(step, like)
    return config, graphdef, state, step, meta


def load_run(
    directory: Path, tokenizer: str | None = None, *, needs_text: bool = True
) -> tuple[TrainConfig, LanguageModel, int, Meta]:
    """Return configuration, model, step and description of a run's last checkpoint.

    The configuration names the run's own copy of its tokenizer, if it keeps one.

    Args:
        directory: of the run.
        tokenizer: a file to use in place of that copy; must be the same tokenizer.
        needs_text: check that the tokenizer is there and the one that the run was trained with.

    Raises:
        UserError: there is none, it cannot be read, or it is of another version; or the tokenizer
            is missing or another one.
    """
    config, graphdef, state, step, meta = load_state(directory)
    if needs_text:
        config = with_kept_tokenizer(config, directory, meta.tokenizer, tokenizer)
    return config, nnx.merge(graphdef, state.params, state.rest), step, meta


def run_tokenizer(directory: Path) -> str | None:
    """Return a run's kind of tokens: `bytes`, the SHA-256 of a tokenizer file, or None.

    Raises:
        UserError: its last checkpoint cannot be read.
    """
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            return None
        meta = checkpoints.meta(step)
    data = _config_of(directory, meta).data
    return "bytes" if getattr(data, "tokenizer", None) == "bytes" else meta.tokenizer


def _config_of(directory: Path, meta: Meta) -> TrainConfig:
    try:
        return from_dict(_with_old_defaults(meta.config))
    except ValueError as error:
        raise _other_version(directory, error) from error


def _with_old_defaults(config: Any) -> Any:
    """Return a checkpoint's configuration with keys that had no name when it was written."""
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or data.get("task", TextConfig.task) != TextConfig.task:
        return config
    # Documents were concatenated without a separator.
    return config | {"data": {"separator": ""} | data}


def _other_version(directory: Path, error: Exception) -> UserError:
    return UserError(
        f"{directory} holds a checkpoint of another version ({error}); "
        "use the version that wrote it, or another run.directory"
    )


def _check_disk_space(directory: Path, state: TrainState) -> None:
    """Check that the disk has space for a checkpoint.

    Orbax writes from many threads; on a full disk each prints its own traceback.

    Raises:
        OSError: it has not.
    """
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=directory) as file:
            # Orbax writes the arrays twice, then drops one copy; small files take blocks each.
            os.posix_fallocate(file.fileno(), 0, 2 * arrays + 2**20)


def _tree(state: TrainState) -> dict[str, Any]:
    return dict(state._asdict())


def _reason(error: BaseException) -> str:
    """Return the shortest useful form of a storage error, which may run to many lines."""
    known = (
        "No space left on device",
        "File too large",
        "Permission denied",
        "Disk quota exceeded",
    )
    text = " ".join(str(error).split())
    return next((words for words in known if words.lower() in text.lower()), text[:160])
