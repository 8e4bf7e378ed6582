"""Checkpoints: parameters, optimiser state, random state, data position and configuration."""

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import jax  # import before grain: without jax, grain only logs a warning

# isort: split
import grain
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from mc_core.errors import UserError
from mc_jax import LanguageModel
from mc_jax.sharding import shard_model
from train.config import TrainConfig, first_difference, to_dict
from train.config.overrides import override
from train.data.position import PositionRestore, PositionSave
from train.data.tokenizer_copy import FILE, describe, with_tokenizer_copy
from train.distributed import from_main, is_main, together
from train.saved_config import config_of, other_version
from train.stacked import stack_like, unstack_arrays, unstack_blocks
from train.step import TrainState, abstract_state, averaged
from train.storage import BackgroundErrors, check_disk_space, reason
from train.variant import make_variant


class Meta(NamedTuple):
    """Metadata of a checkpoint, saved as JSON."""

    config: dict[str, Any]
    fingerprint: str  # hash of the data
    seconds: float  # training time, summed over sessions
    grown: Sequence[Sequence[int]] = ()  # extensions of the run: [step, new run.steps]
    tokenizer: str | None = None  # SHA-256 of the tokenizer file


class HasPosition(Protocol):
    """An iterator over batches with a position."""

    def get_state(self) -> dict[str, Any]:
        """Return the position, in a form that JSON can hold."""


class Checkpoints:
    """The checkpoints of one run.

    Checkpoints are written in the background, to a temporary directory that is then renamed, so an
    interrupt never leaves an incomplete checkpoint. Old checkpoints are deleted after a new one is
    complete. Leaving the context waits for the last checkpoint.

    Args:
        run: run directory.
        keep: number of checkpoints to keep; None = only read. A writer removes the temporary
            directories of killed processes.
    """

    def __init__(self, run: Path, keep: int | None = None):
        self.directory = (run / "checkpoints").resolve()
        self.run = run
        self._keep = keep
        self._open: ocp.CheckpointManager | None = None
        self._saving: int | None = None  # step of the checkpoint that is being written
        self._errors = BackgroundErrors()

    def __enter__(self) -> Self:
        self._errors.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if error is None or isinstance(error, KeyboardInterrupt):
                self.wait()
        finally:
            # After an error of one process, closing would wait for the others.
            if self._open and not (self._errors.found and jax.process_count() > 1):
                with contextlib.suppress(*([Exception] if self._errors.found else [])):
                    self._open.close()
            if self._errors.found and is_main():  # free the space that was left
                for path in self.directory.glob("*.*tmp*"):
                    shutil.rmtree(path, ignore_errors=True)
            self._errors.__exit__(kind, error, at)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        # Created lazily: the constructor of the manager creates the directory.
        if self._open is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                enable_async_checkpointing=self._keep is not None,
                cleanup_tmp_directories=self._keep is not None,
            )
            self._open = ocp.CheckpointManager(self.directory, options=options)
        return self._open

    def latest(self) -> int | None:
        """Return the last saved step, or None."""
        # Constructing the manager synchronizes the processes, so that all do it or none.
        if self._open is None and not from_main(self.directory.is_dir()):
            return None
        return self._manager.latest_step()

    def meta(self, step: int) -> Meta:
        """Return the metadata of the checkpoint of a step.

        Raises:
            UserError: the checkpoint cannot be read, or was written by another version.
        """
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        found = self._restore(step, args).meta
        try:
            return Meta(**found)
        except TypeError as error:
            raise other_version(self.run, error) from error

    def save(self, step: int, state: TrainState, batches: HasPosition, meta: Meta) -> None:
        """Save the state after `step` steps and the position of the data.

        Returns when the arrays are copied from the device. The rest is done in the background;
        `wait`, `check` and the next `save` raise its errors.

        Raises:
            UserError: this or the previous checkpoint cannot be written; earlier checkpoints are
                unchanged.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(unstack_arrays(state))),
            data=PositionSave(batches.get_state()),
            meta=ocp.args.JsonSave(meta._asdict()),
        )
        with together():
            self.wait()
        self._saving = step
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with together():
                check_disk_space(self.directory, state)
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # storage errors include ValueError and exception groups
            raise self._failed(error) from error

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: it cannot be written; earlier checkpoints are unchanged.
        """
        if self._saving is None:
            return
        while self._manager.is_saving_in_progress() and not self._errors.found:
            time.sleep(0.002)
        self.check()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._saving = None

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, without waiting.

        Raises:
            UserError: see `wait`.
        """
        if self._saving is not None and self._errors.found:
            raise self._failed(self._errors.found[0]) from self._errors.found[0]

    def _failed(self, error: BaseException) -> UserError:
        """Return the error of the checkpoint that was being written."""
        step, self._saving = self._saving, None
        self._errors.found.append(error)
        return UserError(
            f"{self.run}: cannot save the checkpoint of step {step} ({reason(error)}); "
            f"free disk space and run the same command: it resumes from step {last_step(self.run)}"
        )

    def restore(
        self, step: int, like: TrainState, batches: grain.DatasetIterator | None = None
    ) -> TrainState:
        """Return the state after `step` steps, and set the position of `batches`.

        Args:
            step: step of the checkpoint.
            like: state with the expected shapes, dtypes and sharding.
            batches: data iterator to restore, if any.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        abstract = _tree(jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract)}
        if batches is not None:
            items["data"] = PositionRestore(batches)
        restored = self._restore(step, ocp.args.Composite(**items))
        return stack_like(like._replace(**restored.state), like)

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{self.directory / str(step)}: cannot be read ({reason(error)}); "
                "delete it to resume from the previous checkpoint"
            ) from error


def last_step(run: Path) -> int:
    """Return the step of the last complete checkpoint of a run directory, 0 without one."""
    names = [path.name for path in (run / "checkpoints").glob("*")]
    return max(map(int, filter(str.isdecimal, names)), default=0)


def check_same_run(directory: Path, saved: Meta, now: Meta, *, may_grow: bool = False) -> None:
    """Check that a run may resume from a checkpoint: same configuration, tokenizer and text.

    Args:
        directory: run directory.
        saved: metadata of the checkpoint.
        now: metadata of the resuming run.
        may_grow: allow a larger `run.steps`. If False, the run must never have been extended.

    Raises:
        UserError: the run differs; the message has the first key that does.
    """
    # Parse the saved configuration, so that keys added since then get their defaults.
    before = _with_current_values(to_dict(config_of(directory, saved.config)), saved, now)
    old_steps, steps = before["run"]["steps"], now.config["run"]["steps"]
    if may_grow:
        if steps < old_steps:
            raise UserError(
                f"{directory} has a checkpoint with run.steps = {old_steps}, got {steps}: "
                "run.steps must not decrease; change it back, or set another run.directory"
            )
        before["run"]["steps"] = steps
    difference = first_difference(before, now.config)
    if difference:
        key, old, new = difference
        raise UserError(
            f"{directory} has a checkpoint of another config: {key} was {old!r} and is {new!r}; "
            "change it back, or set another run.directory"
        )
    if saved.tokenizer != now.tokenizer and saved.tokenizer is not None:
        path = now.config["data"]["tokenizer"]
        raise UserError(
            f"{directory} was trained with {directory / FILE} ({describe(saved.tokenizer)}), and "
            f"data.tokenizer = {path} is another file ({describe(now.tokenizer)}): use "
            "the run's file, or set another run.directory"
        )
    if saved.fingerprint != now.fingerprint:
        older = "separator" not in saved.config["data"]
        hint = ", or it was trained without separators (data.separator='')" if older else ""
        raise UserError(
            f"{directory} has a checkpoint of other text: the files of data.corpus have "
            f"changed{hint}; restore them, or set another run.directory"
        )
    if saved.grown and not may_grow:
        raise UserError(
            f"{directory} has a checkpoint of a run that was extended at step "
            f"{saved.grown[0][0]}: its learning rates differ from those of this config; "
            "delete it, or set another directory"
        )


def _with_current_values(before: dict[str, Any], saved: Meta, now: Meta) -> dict[str, Any]:
    """Return a checkpoint's configuration with the current values of keys that may differ.

    The path of the tokenizer may differ if its hash is equal. Checkpoints from before
    `data.separator` have no separator; for these, only the fingerprint of the text is compared.
    """
    data = dict(before["data"])
    if saved.tokenizer is not None and saved.tokenizer == now.tokenizer:
        data["tokenizer"] = now.config["data"].get("tokenizer")
    if "separator" not in saved.config["data"]:
        data["separator"] = now.config["data"].get("separator")
    return before | {"data": data}


def load_state(
    directory: Path, mesh: Mesh | None = None
) -> tuple[TrainConfig, nnx.GraphDef, TrainState, int, Meta]:
    """Return configuration, graph definition, state, step and metadata of the last checkpoint.

    Args:
        directory: run directory.
        mesh: devices over which the state is sharded; None = the default device. The mesh of the
            run does not matter.

    Raises:
        UserError: there is no checkpoint, or it cannot be read or was written by another version.
    """
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"{directory}: no checkpoint found; must be a run directory")
        meta = checkpoints.meta(step)
        config = config_of(directory, meta.config)
        graphdef, like = abstract_state(config, mesh)
        state = checkpoints.restore(step, like)._replace(faults=None)
    return config, graphdef, state, step, meta


def load_run(
    directory: Path,
    tokenizer: str | None = None,
    *,
    needs_text: bool = True,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> tuple[TrainConfig, LanguageModel, int, Meta]:
    """Return configuration, model, step and metadata of a run's last checkpoint.

    The model has the average of the parameters if the run has one. The tokenizer of the
    configuration is the run's copy of the file, if there is one.

    Args:
        directory: run directory.
        tokenizer: path used in place of the copy; must have the same content.
        needs_text: check that the tokenizer exists and equals the one used in training.
        overrides: `key=value` changes of the configuration that need no new parameter, such as
            `model.layer.aggregation=mean`; see `train.config.overrides`.
        mesh: see `load_state`.

    Raises:
        UserError: there is no checkpoint, or it cannot be read or was written by another version;
            the tokenizer is missing or differs; or an override is invalid or needs a parameter that
            the run does not have.
    """
    config, graphdef, state, step, meta = load_state(directory, mesh)
    state = averaged(state, config)
    if needs_text:
        config = with_tokenizer_copy(config, directory, meta.tokenizer, tokenizer)
    model = nnx.merge(graphdef, state.params, state.rest)
    if overrides:
        config = override(config, overrides)
        model = make_variant(model, config.model, overrides, config.run.dtype)
        shard_model(model, mesh)
    return config, model, step, meta


def run_tokenizer(directory: Path) -> str | None:
    """Return `bytes` or the SHA-256 of a run's tokenizer file; None if there is neither.

    Raises:
        UserError: the last checkpoint cannot be read.
    """
    meta = last_meta(directory)
    if meta is None:
        return None
    data = config_of(directory, meta.config).data
    return "bytes" if getattr(data, "tokenizer", None) == "bytes" else meta.tokenizer


def run_separator(directory: Path) -> str | None:
    """Return `data.separator` of a run; None if it has none.

    Raises:
        UserError: the last checkpoint cannot be read.
    """
    meta = last_meta(directory)
    data = None if meta is None else config_of(directory, meta.config).data
    return getattr(data, "separator", None)


def last_meta(directory: Path) -> Meta | None:
    """Return the metadata of a run's last checkpoint; None if there is none.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest()
        return None if step is None else checkpoints.meta(step)


def _tree(state: TrainState) -> dict[str, Any]:
    """Return the saved fields of a state, with one subtree per block."""
    fields = unstack_blocks(state)._asdict() | {"faults": None}
    return {name: value for name, value in fields.items() if value is not None}
