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
    """Scores states of one model on held-out data."""

    def row(self, state: TrainState) -> dict[str, float]:
        """Return the metrics of a validation during training."""

    def report(self, state: TrainState, step: int, seconds: float) -> Any:
        """Return the report of the state after `step` steps and `seconds` of training."""

    def finish(self, directory: Path, state: TrainState, report: Any) -> Any:
        """Write the report and the pictures of a run that has ended; return the report."""


class Task(Protocol):
    """The data of a run.

    Attributes:
        fingerprint: changes when the data does.
    """

    fingerprint: str

    @property
    def notes(self) -> Sequence[str]:
        """Return notes on the data, printed at the start of a run."""

    def batches(self) -> grain.DatasetIterator:
        """Iterate without end over [accumulation, batch_size, ...]; grain saves the position."""

    def scoring(self, graphdef: nnx.GraphDef) -> Scoring:
        """Return the scoring of a model's states."""

    def load_report(self, directory: Path) -> Any:
        """Return the report of a run that has ended, or None."""

    def print_report(self, console: Console, directory: Path, report: Any) -> None:
        """Print a report."""


def load_task(config: TrainConfig) -> Task:
    """Read or prepare the data of a run.

    Raises:
        UserError: it cannot be used.
    """
    check_readable(config)
    return TextTask(config) if isinstance(config.data, TextConfig) else RecallTask(config)
