"""Training loop: train or resume a run, and evaluate its last checkpoint."""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from train.checkpoint import Checkpoints, Meta, check_same_run, last_meta, last_step, load_run
from train.config import TrainConfig, to_dict
from train.data.tokenizer_copy import copy_tokenizer, tokenizer_hash
from train.distributed import is_main, lost_peers, own_rows, to_host, together
from train.evaluation.run_report import FILE
from train.interrupt import on_interrupt
from train.lock import Lock
from train.mesh import check_batch, open_mesh
from train.optimizer import describe_extension
from train.session import Session
from train.step import TrainState, averaged, build, split
from train.tasks.task import Task, load_task
from train.warm_start import initial_state


def train(config: TrainConfig, console: Console, *, claimed: bool = False) -> Any:
    """Train, or resume from the last checkpoint, and print the report.

    A finished run is not trained again. If `run.steps` is larger than in the checkpoint, training
    continues from the checkpoint with the new schedule.

    Args:
        config: configuration of the run.
        console: receives progress and the report.
        claimed: the caller has locked the run's directory, and `run.steps` must not have changed.
            Set by sweeps, in which equal configurations must have equal results.

    Raises:
        UserError: the data, the configuration, the run's directory or the mesh is invalid, or
            another process trains in the directory.
        NotFiniteError: a NaN or an infinity occurred; the last checkpoint is finite.
        KeyboardInterrupt: the message states the step from which the run resumes.
    """
    directory = Path(config.run.directory)
    mesh = open_mesh(config.run.mesh)
    check_batch(config, mesh)
    locks = is_main() and not claimed
    with (
        closing(Lock.of_run(directory)) as lock,
        on_interrupt(lambda: _interrupt_message(directory)),
        lost_peers(f"the same command resumes {directory}"),
    ):
        _check_same_config(config, may_grow=not claimed)
        with together():
            if locks and directory.is_dir():
                lock.acquire()
            task = load_task(config)
            # Create a new directory only after all checks.
            if locks:
                lock.acquire()
        return _train(config, mesh, task, console, may_grow=not claimed)


def _check_same_config(config: TrainConfig, *, may_grow: bool) -> None:
    """Check the configuration of an existing checkpoint before the corpus is read.

    Corpus and tokenizer are compared after they are read.
    """
    directory = Path(config.run.directory)
    saved = last_meta(directory)
    if saved is not None:
        now = Meta(to_dict(config), saved.fingerprint, 0.0, tokenizer=saved.tokenizer)
        check_same_run(directory, saved, now, may_grow=may_grow)


def _interrupt_message(directory: Path) -> str:
    return f"interrupted: the same command resumes {directory} from step {last_step(directory)}"


def _train(config: TrainConfig, mesh: Mesh, task: Task, console: Console, *, may_grow: bool) -> Any:
    run, directory = config.run, Path(config.run.directory)
    if not is_main():
        console = Console(quiet=True)
    meta = Meta(to_dict(config), task.fingerprint, 0.0, tokenizer=tokenizer_hash(config))
    with Checkpoints(directory, run.keep) as checkpoints:
        saved_step = checkpoints.latest()
        start = saved_step or 0
        saved = meta if saved_step is None else checkpoints.meta(saved_step)
        if saved_step is not None:
            check_same_run(directory, saved, meta, may_grow=may_grow)
            meta = meta._replace(seconds=saved.seconds, grown=_extensions(saved, start, run.steps))
        if start == run.steps and (report := _final_report(task, directory, start)):
            task.print_report(console, directory, report)
            return report

        graphdef, state, step_fn = build(config, mesh)
        if saved_step is None and run.init_from is not None:
            state = initial_state(config, state, console)
        batches = task.batches(own_rows(mesh, run.batch_size))
        scoring = task.scoring(graphdef)
        with together():
            if is_main():
                copy_tokenizer(directory, config)
        for note in task.notes:
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        if saved_step is not None:
            state = checkpoints.restore(start, state, batches)
            console.print(f"resuming from step {start} of {run.steps}: {directory}", soft_wrap=True)
            if len(meta.grown) > len(saved.grown):
                old_steps = saved.config["run"]["steps"]
                line = describe_extension(config.optimizer, start, old_steps, run.steps)
                console.print(line, soft_wrap=True, highlight=False)

        directory.mkdir(parents=True, exist_ok=True)
        if start < run.steps and is_main():  # an existing report is outdated
            (directory / FILE).unlink(missing_ok=True)
        session = Session(config, mesh, step_fn, scoring, checkpoints)
        state, seconds = session.train(state, start, batches, meta, console)

    state = averaged(state, config)
    report = scoring.report(state, run.steps, seconds)
    if jax.process_count() > 1:  # the rest is up to the main process, on one of its devices
        params, rest = jax.tree.map(jnp.asarray, to_host((state.params, state.rest)))
        state = TrainState(params, (), rest)
    if is_main():
        report = scoring.finish(directory, state, report)
    task.print_report(console, directory, report)
    return report


def _extensions(saved: Meta, step: int, steps: int) -> list[Sequence[int]]:
    """Return all extensions of `run.steps`, including the current one to `steps`."""
    grows = step > 0 and saved.config["run"]["steps"] < steps
    return [*saved.grown, *([[step, steps]] if grows else [])]


def _final_report(task: Task, directory: Path, steps: int) -> Any:
    """Return the report of a run that finished after `steps` steps, or None."""
    report = task.load_report(directory)
    return report if report and report.steps == steps else None


def evaluate(directory: Path, console: Console, overrides: Sequence[str] = ()) -> Any:
    """Evaluate the last checkpoint of a finished or unfinished run, and print the table.

    Args:
        directory: run directory.
        console: receives the table.
        overrides: as in `load_run`; part of the report's name.

    Raises:
        UserError: there is no checkpoint, it cannot be read, the data differ from the run's, or an
            override is not allowed.
    """
    config, model, step, saved = load_run(directory, overrides=overrides)
    task = load_task(config)
    now = saved._replace(fingerprint=task.fingerprint)
    check_same_run(directory, saved, now, may_grow=True)
    graphdef, params, rest = split(model)
    scoring, state = task.scoring(graphdef), TrainState(params, (), rest)
    report = scoring.with_heads(state, scoring.report(state, step, saved.seconds))
    report = dataclasses.replace(report, name=" ".join((report.name, *overrides)))
    task.print_report(console, directory, report)
    return report
