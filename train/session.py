"""The steps of a run from a checkpoint to its end or to an interrupt."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
from jax.sharding import Mesh
from rich.console import Console

from train.checkpoint import Checkpoints, Meta
from train.config import TrainConfig
from train.distributed import is_main, terminated, to_mesh
from train.faults import check_finite, tensor_names
from train.interrupt import Terminated
from train.metrics import Curves, NoCurves
from train.optimizer import make_schedule
from train.prefetch import InFlight, Prefetch
from train.progress import Progress
from train.step import Metrics, TrainState, TrainStep, averaged
from train.tasks.task import Scoring
from train.utilization import Trace, make_mfu, memory


class Outputs(NamedTuple):
    """Where a session reads batches and writes results."""

    batches: Prefetch
    curves: Curves
    progress: Progress
    trace: Trace


class Session:
    """The training loop. It waits for the device only to log, validate and save.

    Args:
        config: configuration of the run.
        mesh: devices of the run.
        step_fn: the training step.
        scoring: validation of the task.
        checkpoints: checkpoints of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        step_fn: TrainStep,
        scoring: Scoring,
        checkpoints: Checkpoints,
    ):
        self._config = config
        self._mesh = mesh
        self._step_fn = step_fn
        self._scoring = scoring
        self._checkpoints = checkpoints
        self._schedule = make_schedule(config.optimizer, config.run.steps)
        self._mfu_of = make_mfu(config)

    def train(
        self,
        state: TrainState,
        start: int,
        batches: grain.DatasetIterator,
        meta: Meta,
        console: Console,
    ) -> tuple[TrainState, float]:
        """Train from step `start` to `run.steps`; wait for the last checkpoint.

        Args:
            state: state after `start` steps; its buffers are donated.
            start: number of finished steps.
            batches: batches of this process, at the position of the state.
            meta: metadata of the checkpoints.
            console: receives progress.

        Returns:
            the last state, and the training time in seconds, over all sessions.

        Raises:
            NotFiniteError: a NaN or an infinity occurred; the last checkpoint is finite.
            Terminated: a process of several received SIGTERM; the last step is saved.
            UserError: a checkpoint or a row of the curves cannot be written.
        """
        run, directory = self._config.run, Path(self._config.run.directory)
        place = partial(to_mesh, mesh=self._mesh, rows=run.batch_size)
        with (
            Curves(directory, start) if is_main() else NoCurves() as curves,
            Progress(console, start, self._config, meta) as progress,
            Trace(directory, run.profile if is_main() else None) as trace,
            Prefetch(batches, place) as ahead,
        ):
            outputs = Outputs(ahead, curves, progress, trace)
            state, meta = self._steps(state, start, meta, outputs)
            self._checkpoints.wait()
        return state, meta.seconds

    def _steps(
        self, state: TrainState, start: int, meta: Meta, outputs: Outputs
    ) -> tuple[TrainState, Meta]:
        run, (batches, curves, progress, trace) = self._config.run, outputs
        names, in_flight, last_saved = tensor_names(state.params), InFlight(), start

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == run.steps)

        for step in range(start + 1, run.steps + 1):
            trace.before(step)
            state, metrics = self._step_fn(state, next(batches))
            trace.after(step, metrics.loss)
            in_flight.add(metrics.loss)
            if step == start + 1:
                jax.block_until_ready(metrics)  # the speed excludes the first step
            progress.step(step)
            logs, validates = due(step, run.log_every), due(step, run.validate_every)
            stops = terminated(step)
            saves = stops or due(step, run.save_every)
            if logs or validates or saves:
                self._checkpoints.check()
                metrics = jax.device_get(metrics)
                if metrics.faults.step:
                    self._checkpoints.wait()  # the message names the last one
                    check_finite(metrics.faults, names, start, last_saved)
            if logs:
                self._log(step, metrics, outputs)
            if validates:
                curves.write(step, **self._scoring.row(averaged(state, self._config)))
            if saves:
                meta = meta._replace(seconds=progress.seconds)
                self._checkpoints.save(step, state, batches, meta)
                last_saved = step
            if stops:
                self._checkpoints.wait()
                raise Terminated
        return state, meta

    def _log(self, step: int, metrics: Metrics, outputs: Outputs) -> None:
        """Write a row of the curves, from metrics on the host."""
        loss, speed = float(metrics.loss), outputs.progress.row(step, float(metrics.loss))
        outputs.curves.write(
            step,
            loss=loss,
            grad_norm=float(metrics.grad_norm),
            learning_rate=float(self._schedule(step - 1)),
            tokens_per_second=speed,
            seconds=outputs.progress.seconds,
            data_wait_seconds=outputs.batches.take_waited(),
            **self._mfu_of(speed),
            **memory(),
        )
