"""Common interface of the tasks: text and recall."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
from flax import nnx
from rich.console import Console

from train.config import TextConfig, TrainConfig
from train.data.tokenizer_copy import check_readable
from train.step import TrainState
from train.tasks.recall import RecallTask
from train.tasks.text import TextTask


class Scoring(Protocol):
    """Evaluates training states of one model on held-out data."""

    def row(self, state: TrainState) -> dict[str, float]:
        """Return validation metrics during training."""

    def report(self, state: TrainState, step: int, seconds: float) -> Any:
        """Return the report of the state after `step` steps and `seconds` of training."""

    def with_heads(self, state: TrainState, report: Any) -> Any:
        """Add recall and dead heads to the report of a text run."""

    def finish(self, directory: Path, state: TrainState, report: Any) -> Any:
        """Write the report and the plots of a finished run; return the report."""


class Task(Protocol):
    """The data of a run.

    Attributes:
        fingerprint: hash of the data.
    """

    fingerprint: str

    @property
    def notes(self) -> Sequence[str]:
        """Return notes on the data, printed at the start of a run."""

    def batches(self, own: Sequence[int] | None = None) -> grain.DatasetIterator:
        """Return an infinite iterator over batches [accumulation, batch_size, ...].

        `own` are the rows of each microbatch that this process reads; None = all.
        """

    def scoring(self, graphdef: nnx.GraphDef) -> Scoring:
        """Return the scoring of a model's states."""

    def load_report(self, directory: Path) -> Any:
        """Return the report of a finished run, or None."""

    def print_report(self, console: Console, directory: Path, report: Any) -> None:
        """Print a report."""


def load_task(config: TrainConfig) -> Task:
    """Read or prepare the data of a run.

    Raises:
        UserError: the data cannot be used.
    """
    check_readable(config)
    return TextTask(config) if isinstance(config.data, TextConfig) else RecallTask(config)
