"""The configuration of a run: frozen dataclasses that check their values."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mc_core import ModelConfig, serialization
from mc_core.checks import check_choice, check_range, raise_config_error
from mc_core.errors import UserError
from mc_core.optimizer import OptimizerConfig
from mc_core.serialization import Tag
from train.config.recall_schema import TAG, TASKS, MQARConfig, NIAHConfig


@dataclass(frozen=True)
class TextConfig:
    """Next-token prediction on text; the default task.

    Attributes:
        corpus: files, folders, or the word `stdlib` (the running Python's standard library).
        tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
        separator: placed between two documents: text, or the name of a special token of the
            tokenizer; "" for nothing. None: the tokenizer's end-of-text token, if it has one that
            `train.data.separator` knows; otherwise a newline where a document does not end with
            one.
        window: predicted tokens per training example.
        validation_fraction: held-out share of the documents, or of a single document.
        validation_bytes: limit of the held-out text scored at the end.
        train_bytes: limit of the training text; None for all of it.
    """

    tag: ClassVar[Tag] = TAG
    task: ClassVar[str] = "text"

    corpus: tuple[str, ...]
    tokenizer: str = "bytes"
    separator: str | None = None
    window: int = 512
    validation_fraction: float = 0.05
    validation_bytes: int = 262_144
    train_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.corpus:
            raise_config_error(
                "TextConfig", "corpus", list(self.corpus), "at least one file or folder"
            )
        for name in ("window", "validation_bytes", "train_bytes"):
            check_range(self, name, 1)
        check_range(self, "validation_fraction", 0.0, 1.0, open_low=True, open_high=True)
        try:
            (self.separator or "").encode()
        except UnicodeEncodeError:
            raise_config_error("TextConfig", "separator", self.separator, "text in UTF-8")

    @property
    def mean_tokens(self) -> float:
        """Tokens that an example predicts."""
        return self.window

    @property
    def max_tokens(self) -> int:
        """Tokens that an example predicts, as each has the same number."""
        return self.window

    @property
    def min_vocab_size(self) -> int:
        """The smallest `model.vocab_size` that can read the text, as far as it is known."""
        return 256 if self.tokenizer == "bytes" else 1


DataConfig = TextConfig | MQARConfig | NIAHConfig
TASKS.update({config.task: config for config in (TextConfig, MQARConfig, NIAHConfig)})


@dataclass(frozen=True)
class RunConfig:
    """Length, batches, checkpoints and outputs of a run.

    Attributes:
        steps: optimiser steps; may grow when a run is resumed, finished or not.
        batch_size: windows, or examples of a recall task, of a microbatch.
        accumulation: microbatches per step; their mean gradient is applied.
        devices: local devices over which a microbatch is split; all hold the parameters.
        seed: of the parameters, the order of the data and the examples of a recall task.
        dtype: compute type, `float32` or `bfloat16`; parameters are float32.
        directory: of all outputs; `runs/<name of the config file>` unless set.
        log_every: steps between rows of the curves.
        save_every: steps between checkpoints; the last step is always saved.
        keep: number of checkpoints to keep.
        validate_every: steps between validations; 0 for the end only.
        validate_bytes: held-out text scored during training; recall tasks score all examples.
        sample_tokens: length of the sample generated at the end; 0 for none.
        init_from: directory of a run; its last checkpoint gives the initial parameters. None draws
            them from the seed.
        init_optimizer: also take AdamW's moments and their step count from that checkpoint. The
            schedule, the data and the random streams of the new run begin at step 0 either way.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    devices: int = 1
    seed: int = 0
    dtype: str = "float32"
    directory: str = "runs/run"
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    validate_every: int = 0
    validate_bytes: int = 32_768
    sample_tokens: int = 200
    init_from: str | None = None
    init_optimizer: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep"):
            check_range(self, name, 1)
        check_range(self, "devices", 1)
        if self.batch_size % self.devices:
            allowed = f"a divisor of run.batch_size = {self.batch_size}"
            raise_config_error("RunConfig", "devices", self.devices, allowed)
        check_range(self, "validate_bytes", 1)
        check_range(self, "seed", 0, 2**32 - 1)  # what grain takes
        check_range(self, "validate_every", 0)
        check_range(self, "sample_tokens", 0)
        check_choice(self, "dtype", ("float32", "bfloat16"))
        if self.init_optimizer and self.init_from is None:
            raise_config_error(
                "RunConfig", "init_optimizer", True, "false where run.init_from is not set"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    data: DataConfig
    model: ModelConfig
    run: RunConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        least = self.data.min_vocab_size
        if self.model.vocab_size < least:
            reason = (
                f"data.vocab_size = {least}" if self.data.task == "mqar" else f"{least} for bytes"
            )
            raise_config_error(
                "TrainConfig", "model.vocab_size", self.model.vocab_size, f">= {reason}"
            )
        warmup = self.optimizer.warmup_steps
        if warmup >= self.run.steps:
            allowed = f"< run.steps = {self.run.steps}"
            raise_config_error("TrainConfig", "optimizer.warmup_steps", warmup, allowed)

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the run's text.

        Raises:
            UserError: the run knows no text.
        """
        if isinstance(self.data, MQARConfig):
            raise UserError(f"{self.run.directory}: a run on data.task = 'mqar' knows no text")
        return self.data.tokenizer


def from_dict(data: Any) -> TrainConfig:
    """Build from `to_dict`'s form, strictly.

    Raises:
        ValueError: one line with the key's path, its value and what is allowed.
    """
    return serialization.from_dict(TrainConfig, data)
