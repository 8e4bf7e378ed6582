"""The configuration of a run: frozen dataclasses that check their values."""

from dataclasses import dataclass, field
from typing import ClassVar

from mc_core import ModelConfig
from mc_core.checks import check_choice, check_range, raise_config_error
from mc_core.errors import UserError
from mc_core.optimizer import OptimizerConfig
from train.config.recall_schema import MQARConfig, NIAHConfig


@dataclass(frozen=True)
class TextConfig:
    """Text, every token of which is predicted from those before it: what `data` is by default.

    Attributes:
        corpus: files, folders, or the word `stdlib` (the running Python's standard library).
        tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
        separator: what stands between two documents: text, or the name of one of the tokenizer's
            special tokens; "" for nothing. None: the tokenizer's end-of-text token, if it has one
            that `train.data.separator` knows, else a newline where a document does not end with
            one.
        window: tokens that a training example predicts.
        validation_fraction: share of the documents (or of a single document) that is held out.
        validation_bytes: at most so much held-out text is scored at the end.
        train_bytes: at most so much text is trained on; None for all of it.
    """

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
TASKS: dict[str, type[DataConfig]] = {
    config.task: config for config in (TextConfig, MQARConfig, NIAHConfig)
}


@dataclass(frozen=True)
class RunConfig:
    """How long, with what, and what is kept.

    Attributes:
        steps: optimiser steps; may grow when a run is resumed, finished or not.
        batch_size: windows, or examples of a recall task, of a microbatch.
        accumulation: microbatches of a step; their mean gradient is applied.
        devices: local devices over which a microbatch is split; all hold the parameters.
        seed: of the parameters, of the data's order, and of what a recall task draws.
        dtype: compute type, `float32` or `bfloat16`; parameters are float32.
        directory: where everything goes; `runs/<name of the config file>` unless set.
        log_every: steps from one row of the curves to the next.
        save_every: steps from one checkpoint to the next; the last step is always saved.
        keep: how many checkpoints stay.
        validate_every: steps from one validation to the next; 0 for the end only.
        validate_bytes: held-out text that is scored on the way; recall tasks score all examples.
        sample_tokens: length of the text that the trained model writes at the end; 0 for none.
        init_from: directory of a run whose last checkpoint gives the initial parameters; None draws
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
            raise_config_error("ModelConfig", "vocab_size", self.model.vocab_size, f">= {reason}")
        warmup = self.optimizer.warmup_steps
        if warmup >= self.run.steps:
            raise_config_error(
                "OptimizerConfig", "warmup_steps", warmup, f"< run.steps = {self.run.steps}"
            )

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the run's text.

        Raises:
            UserError: the run knows no text.
        """
        if isinstance(self.data, MQARConfig):
            raise UserError(f"{self.run.directory}: a run on data.task = 'mqar' knows no text")
        return self.data.tokenizer
