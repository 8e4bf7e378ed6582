"""Options of `mc evaluate`, and their checks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mc_core.errors import UserError
from train.config import TrainConfig
from train.config.recall_schema import MQARConfig

TEXT_OPTIONS = ("task", "corpus")
LENGTH_OPTIONS = (*TEXT_OPTIONS, "lengths", "seed", "compare")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `mc evaluate`; None = the value of the run, or the task's default.

    Attributes:
        task: `text`, `mqar` or `niah`.
        lengths: `tokens:pairs,...` (mqar) or `tokens,...` (niah, text).
        examples: number of examples per length and, for niah, depth.
        seed: random seed of the test examples, which never overlap with training examples; or of
            the bootstrap.
        depths: number of depths (niah).
        haystack: `noise` or `essay` (niah).
        value: `number` or `uuid` (niah).
        corpus: files or folders. text: the scored text; niah: an `essay` is drawn from its held-out
            share.
        compare: for text with `lengths`: overrides of further models, `key=value key=value`.
    """

    task: str | None = None
    lengths: str | None = None
    examples: int | None = None
    seed: int = 0
    depths: int | None = None
    haystack: str | None = None
    value: str | None = None
    corpus: tuple[str, ...] | None = None
    compare: tuple[str, ...] = ()


def check_text_options(
    directory: Path, config: TrainConfig, options: EvaluationOptions, plot: Path | None
) -> None:
    """Check that the task `text` supports all options, and that the run has text.

    Raises:
        UserError: the run has no text, or an option is not supported.
    """
    if isinstance(config.data, MQARConfig):
        raise UserError(
            f"{directory}: --task text: data.task = 'mqar' has no text: use mqar or niah"
        )
    reason = "not supported by --task text: use mqar or niah"
    if options.lengths:
        refuse_options(options, LENGTH_OPTIONS, reason)
        return
    if options.compare:
        raise UserError("--compare: needs --lengths")
    refuse_options(options, TEXT_OPTIONS, reason)
    if plot is not None:
        raise UserError(f"--plot: {reason}, or --lengths")


def refuse_options(options: EvaluationOptions, allowed: Sequence[str], reason: str) -> None:
    """Check that only allowed options differ from their defaults.

    Raises:
        UserError: another option was given; the message has its name and the reason.
    """
    for option in dataclasses.fields(options):
        if option.name not in allowed and getattr(options, option.name) != option.default:
            raise UserError(f"--{option.name}: {reason}")
