"""A training run, from its configuration to its report."""

from pathlib import Path
from typing import Any

from rich.console import Console

from bench.devices import gather, local, replicate, split_rows
from train.checkpoint import Checkpoints, Meta, check_same_run, load_run
from train.config import TrainConfig, to_dict
from train.curves import Curves
from train.kept_tokenizer import keep_tokenizer, tokenizer_hash
from train.optimizer import make_schedule
from train.progress import Progress
from train.step import TrainState, build, check_finite, split
from train.tasks.task import load_task


def train(config: TrainConfig, console: Console) -> Any:
    """Train, or go on from the last checkpoint, and report; a finished run only prints its report.

    Raises:
        UserError: the data, the configuration, the run's directory or the number of devices do not
            allow it.
        NotFiniteError: training met a NaN or an infinity; the last checkpoint is from before it.
    """
    run, directory = config.run, Path(config.run.directory)
    devices = local(run.devices, "run.devices")
    task = load_task(config)
    meta = Meta(to_dict(config), task.fingerprint, 0.0, tokenizer=tokenizer_hash(config))
    with Checkpoints(directory, run.keep) as checkpoints:
        saved_step = checkpoints.latest()
        start = saved_step or 0
        if saved_step is not None:
            saved = checkpoints.meta(start)
            check_same_run(directory, saved, meta)
            meta = meta._replace(seconds=saved.seconds)
        if start == run.steps and (report := task.load_report(directory)):
            task.print_report(console, directory, report)
            return report

        graphdef, state, step_fn = build(config)
        state = replicate(state, devices)
        batches = task.batches()
        scoring = task.scoring(graphdef)
        schedule = make_schedule(config.optimizer, run.steps)
        keep_tokenizer(directory, config)
        for note in task.notes:
            console.print(note, soft_wrap=True, highlight=False, markup=False)
        if saved_step is not None:
            state = checkpoints.restore(start, state, batches)
            console.print(f"going on from step {start} of {run.steps}: {directory}", soft_wrap=True)

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == run.steps)

        directory.mkdir(parents=True, exist_ok=True)
        with Curves(directory, start) as curves, Progress(console, start, config, meta) as progress:
            for step in range(start + 1, run.steps + 1):
                state, metrics = step_fn(state, split_rows(next(batches), state, axis=1))
                check_finite(metrics, step, checkpoints.latest() or 0)
                loss = float(metrics.loss)
                progress.step(step, loss)
                if due(step, run.log_every):
                    curves.write(
                        step,
                        loss=loss,
                        grad_norm=float(metrics.grad_norm),
                        learning_rate=float(schedule(step - 1)),
                        tokens_per_second=progress.row(step, loss),
                        seconds=progress.seconds,
                    )
                if due(step, run.validate_every):
                    curves.write(step, **scoring.row(state))
                if due(step, run.save_every):
                    meta = meta._replace(seconds=progress.seconds)
                    checkpoints.save(step, state, batches, meta)

    report = scoring.report(state, run.steps, meta.seconds)
    report = scoring.finish(directory, gather(state), report)
    task.print_report(console, directory, report)
    return report


def evaluate(directory: Path, console: Console) -> Any:
    """Score a run's last checkpoint, finished or not, on validation data, and print the table.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or the data are not those of the run.
    """
    config, model, step, saved = load_run(directory)
    task = load_task(config)
    check_same_run(directory, saved, saved._replace(fingerprint=task.fingerprint))
    graphdef, params, rest = split(model)
    report = task.scoring(graphdef).report(TrainState(params, (), rest), step, saved.seconds)
    task.print_report(console, directory, report)
    return report
