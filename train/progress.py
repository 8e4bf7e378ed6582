"""Progress of a run: a progress bar on terminals, otherwise log lines."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from train.checkpoint import Meta
from train.config import TrainConfig


class Progress:
    """Shows step, loss, tokens per second and remaining time.

    Args:
        console: output console.
        start: number of steps of earlier sessions.
        config: configuration of the run.
        meta: checkpoint metadata, with the training time of earlier sessions.
    """

    def __init__(self, console: Console, start: int, config: TrainConfig, meta: Meta):
        run = config.run
        self._console = console
        self._steps = run.steps
        self._tokens_per_step = run.batch_size * run.accumulation * config.data.mean_tokens
        self._began = time.monotonic() - meta.seconds
        self._log_every = run.log_every
        self._start = start
        self._mark = start, time.monotonic()  # step and time of the last speed measurement
        self._bar = Bar(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "", total=run.steps, completed=start, loss=float("nan"), speed=0.0
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Training time so far, over all sessions."""
        return time.monotonic() - self._began

    def step(self, step: int) -> None:
        """Record a step."""
        self._bar.update(self._task, completed=step)
        # The first step of a session compiles: it counts only if it is a row of its own.
        if step == self._start + 1 < self._steps and step % self._log_every:
            self._mark = step, time.monotonic()

    def row(self, step: int, loss: float) -> float:
        """Show and return the tokens per second since the last row, by wall-clock time."""
        now = time.monotonic()
        speed = (step - self._mark[0]) * self._tokens_per_step / (now - self._mark[1])
        self._mark = step, now
        self._bar.update(self._task, speed=speed, loss=loss)
        if not self._console.is_terminal:
            left = (self._steps - step) * self._tokens_per_step / speed
            self._console.print(
                f"step {step}/{self._steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
                f"{left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
        return speed
