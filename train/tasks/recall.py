"""A recall task of a run: its batches, its validation and its report."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

from mc_core.files import write_atomic
from mc_core.installation import source_commit
from train.config import TrainConfig
from train.config.recall_schema import MQARConfig, NIAHConfig
from train.evaluation.run_report import FILE, draw_curves
from train.evaluation.score import UNITS, Score, join, make_answer
from train.step import TrainState
from train.tasks.examples import Draw, make_batches
from train.tasks.mqar import make_draws
from train.tasks.niah import Needles


@dataclass(frozen=True)
class RecallReport:
    """Result of a recall run, saved as JSON in the run directory.

    A query is correct if the most likely token is the value; a needle is correct if greedy decoding
    returns all of its tokens. A score has the keys accuracy, low and high (Wilson's 95% interval),
    right, asked, and loss in nats per answer token.
    """

    task: str
    name: str
    model: str  # memory and aggregation
    parameters: int
    steps: int
    tokens: int  # training tokens, including repetitions
    seconds: float  # training time, including compilation
    score: dict[str, float]  # score of all validation examples
    lengths: list[dict[str, float]]  # for each length: tokens, pairs (mqar) and the score
    commit: str | None = None  # of the source; see `source_commit`


class RecallTask:
    """Recall task; see `Task`."""

    notes: Sequence[str] = ()

    def __init__(self, config: TrainConfig):
        self._config = config
        self.lengths, self.draws, self.fingerprint = prepare(config)

    def batches(self, own: Sequence[int] | None = None) -> grain.DatasetIterator:
        """Iterate over batches, each of one length."""
        data = self._config.data
        assert isinstance(data, MQARConfig | NIAHConfig)
        return make_batches(self.draws, data.examples, self._config.run, own)

    def scoring(self, graphdef: nnx.GraphDef) -> "RecallScoring":
        """Return the scoring of the validation examples."""
        return RecallScoring(self._config, self, graphdef)

    @staticmethod
    def load_report(directory: Path) -> RecallReport | None:
        """Return the report of a finished run, or None."""
        path = directory / FILE
        if not path.is_file():
            return None
        try:
            return RecallReport(**json.loads(path.read_text()))
        except (TypeError, ValueError):
            return None  # report of another program or version

    @staticmethod
    def print_report(console: Console, directory: Path, report: RecallReport) -> None:
        """Print the accuracy at each length."""
        console.print(
            f"\n{report.name} ({report.model}): {report.parameters:,} parameters, "
            f"{report.steps:,} steps, {report.tokens / 1e6:.3g} M tokens, {report.seconds:.0f} s",
            soft_wrap=True,
            highlight=False,
        )
        unit = UNITS[report.task]
        sizes = [name for name in ("tokens", "pairs") if name in report.lengths[0]]
        table = Table(*sizes, "accuracy", "95%", "loss", unit, title="validation")
        for column in table.columns:
            column.justify = "right"
        rows: list[dict[str, Any]] = [*report.lengths]
        if len(rows) > 1:
            rows.append({"tokens": "all"} | report.score)
        for row in rows:
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            numbers = (
                f"{row['accuracy']:.1%}",
                interval,
                f"{row['loss']:.3f}",
                f"{row['asked']:,}",
            )
            table.add_row(*(str(row.get(name, "")) for name in sizes), *numbers)
        console.print(table)
        console.print(f"curves and checkpoints: {directory}\n", soft_wrap=True)


class RecallScoring:
    """Scores a state on validation examples; see `Scoring`."""

    def __init__(self, config: TrainConfig, task: RecallTask, graphdef: nnx.GraphDef):
        self._config = config
        self._task = task
        self._answer = make_answer(graphdef, config.run.batch_size)

    def scores(self, state: TrainState) -> tuple[Score, list[Score]]:
        """Return the score of all validation examples, and the score of each length."""
        data = self._config.data
        assert isinstance(data, MQARConfig | NIAHConfig)
        count, whole = data.validation_examples, data.task == "niah"
        parts = [
            self._answer(state.params, state.rest, draw, "validation", count)
            for draw in self._task.draws
        ]
        return join(parts).score(whole=whole), [part.score(whole=whole) for part in parts]

    def row(self, state: TrainState) -> dict[str, float]:
        """Return accuracy and loss on all validation examples."""
        score, _ = self.scores(state)
        return {"validation_accuracy": score.accuracy, "validation_loss": score.loss}

    def report(self, state: TrainState, step: int, seconds: float) -> RecallReport:
        """Score all validation examples."""
        config = self._config
        run = config.run
        score, parts = self.scores(state)
        return RecallReport(
            task=config.data.task,
            name=Path(run.directory).name,
            model=config.model.name,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            steps=step,
            tokens=round(step * run.batch_size * run.accumulation * config.data.mean_tokens),
            seconds=seconds,
            score=score.as_dict(),
            lengths=[
                sizes | part.as_dict()
                for sizes, part in zip(self._task.lengths, parts, strict=True)
            ],
            commit=source_commit(),
        )

    def with_heads(self, state: TrainState, report: RecallReport) -> RecallReport:
        """Return the report; `mc evaluate` measures heads on test examples."""
        return report

    def finish(self, directory: Path, state: TrainState, report: RecallReport) -> RecallReport:
        """Write the report and the curves."""
        draw_curves(directory)
        data = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
        write_atomic(directory / FILE, data.encode())
        return report


def prepare(config: TrainConfig) -> tuple[list[dict[str, int]], Sequence[Draw], str]:
    """Return the lengths, a function for each that draws examples, and a fingerprint.

    Raises:
        UserError: a length or the haystack's text cannot be used.
    """
    data, seed = config.data, config.run.seed
    if isinstance(data, MQARConfig):
        lengths = [{"tokens": tokens, "pairs": pairs} for tokens, pairs in data.lengths]
        draws = make_draws(data, data.lengths, seed)
        first = draws[0]("train", 0)
        return lengths, draws, hashlib.sha256(first.tokens.tobytes()).hexdigest()
    assert isinstance(data, NIAHConfig)
    needles = Needles(data, config.model.vocab_size, seed)
    draws = [needles.draw(length) for length in data.lengths]
    return [{"tokens": length} for length in data.lengths], draws, needles.fingerprint
