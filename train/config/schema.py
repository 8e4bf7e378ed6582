"""The configuration of a run: frozen dataclasses that check their values."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mc_core import ModelConfig, serialization
from mc_core.checks import check_choice, check_range, raise_config_error
from mc_core.errors import UserError
from mc_core.log_linear import LogLinearConfig
from mc_core.optimizer import OptimizerConfig
from mc_core.serialization import Tag
from train.config.mesh import MeshConfig
from train.config.recall_schema import TAG, TASKS, MQARConfig, NIAHConfig


@dataclass(frozen=True)
class WeightedCorpus:
    """A folder of tokenized shards with its share of the training examples.

    Attributes:
        path: folder that `mc tokenize` has written.
        weight: share of the examples, relative to the weights of the other folders.
    """

    path: str
    weight: float

    def __post_init__(self) -> None:
        check_range(self, "weight", 0.0, open_low=True)


@dataclass(frozen=True)
class TextConfig:
    """Next-token prediction on text; the default task.

    Attributes:
        corpus: files, folders, or the words `stdlib` and `site-packages` (source code of the
            running Python's standard library and of its installed packages). Or folders of shards
            written by `mc tokenize`; several may be mixed with weights:
            `[{path: a, weight: 0.7}, {path: b, weight: 0.3}]`. Without weights, every folder has
            the share of its number of tokens.
        validation: files or folders of text that is scored instead of held-out documents of the
            corpus.
        tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
        separator: inserted between documents: text, or the name of a special token of the
            tokenizer; "" for no separator. None: the tokenizer's end-of-text token, if it is one of
            `train.data.separator.END_OF_TEXT`; otherwise a newline after each document that does
            not end with one. Shards must have been written with the same separator.
        window: predicted tokens per training example.
        validation_fraction: held-out share of the documents, or of a single document. Shards are
            split when they are written, with `--validation-fraction`.
        validation_bytes: maximum number of held-out bytes scored at the end of training.
        train_bytes: maximum number of training bytes; None for no limit. Not for shards.
    """

    tag: ClassVar[Tag] = TAG
    task: ClassVar[str] = "text"

    corpus: tuple[str | WeightedCorpus, ...]
    tokenizer: str = "bytes"
    separator: str | None = None
    window: int = 512
    validation_fraction: float = 0.05
    validation_bytes: int = 262_144
    train_bytes: int | None = None
    validation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.corpus:
            raise_config_error(
                "TextConfig", "corpus", list(self.corpus), "at least one file or folder"
            )
        if len({isinstance(part, str) for part in self.corpus}) > 1:
            raise_config_error(
                "TextConfig",
                "corpus",
                list(self.corpus_paths),
                "a list of paths, or a list of {path, weight}",
            )
        for name in ("window", "validation_bytes", "train_bytes"):
            check_range(self, name, 1)
        check_range(self, "validation_fraction", 0.0, 1.0, open_low=True, open_high=True)
        try:
            (self.separator or "").encode()
        except UnicodeEncodeError:
            raise_config_error("TextConfig", "separator", self.separator, "text in UTF-8")

    @property
    def corpus_paths(self) -> tuple[str, ...]:
        """The paths and words of `corpus`, without weights."""
        return tuple(part if isinstance(part, str) else part.path for part in self.corpus)

    @property
    def weighted(self) -> bool:
        """True if the parts of `corpus` have weights."""
        return not isinstance(self.corpus[0], str)

    @property
    def mean_tokens(self) -> float:
        """Mean number of predicted tokens per example."""
        return self.window

    @property
    def max_tokens(self) -> int:
        """Maximum number of predicted tokens per example; all examples have the same number."""
        return self.window

    @property
    def min_vocab_size(self) -> int:
        """Lower bound of `model.vocab_size`; 1 until the tokenizer file is loaded."""
        return 256 if self.tokenizer == "bytes" else 1


DataConfig = TextConfig | MQARConfig | NIAHConfig
TASKS.update({config.task: config for config in (TextConfig, MQARConfig, NIAHConfig)})


@dataclass(frozen=True)
class RunConfig:
    """Length, batches, checkpoints and outputs of a run.

    Attributes:
        steps: optimizer steps; may be increased when a run is resumed, even after it finished.
        batch_size: windows, or examples of a recall task, per microbatch.
        accumulation: microbatches per step; gradients are averaged over them.
        mesh: devices that share a microbatch and the parameters.
        distributed: connect the processes of a cluster; see `docs/distributed.md`. SLURM, Open MPI
            and `JAX_COORDINATOR_ADDRESS` need no key.
        seed: random seed of the parameters, the data order and the examples of a recall task.
        dtype: compute dtype, `float32` or `bfloat16`.
        param_dtype: dtype of the parameters, `float32` or `bfloat16`. Gradients are summed, and
            updates computed, in float32; a bfloat16 parameter loses updates below 1/512 of it.
        directory: output directory; default `runs/<name of the config file>`.
        log_every: steps between logged rows of metrics. Only then does the run wait for the device
            and check for non-finite values.
        save_every: steps between checkpoints; the last step is always saved.
        keep: number of checkpoints to keep.
        validate_every: steps between validations; 0: validate only at the end.
        validate_bytes: held-out bytes scored per validation during training; recall tasks score all
            examples.
        sample_tokens: length of the sample generated at the end; 0 for none.
        init_from: run directory whose last checkpoint provides the initial parameters. None:
            random initialization.
        init_optimizer: also load the moments and their step count from that checkpoint. The
            schedule, the data and the random streams of the new run always begin at step 0.
        profile: first and last step of a trace of `jax.profiler`, for TensorBoard and XProf; None:
            no trace.
        peak_flops: FLOPs per second of a device, to compute the MFU. None: those of dense bfloat16
            products of `mc_core.chips`, or no MFU on other devices.
    """

    steps: int
    batch_size: int = 8
    accumulation: int = 1
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: bool = False
    seed: int = 0
    dtype: str = "float32"
    param_dtype: str = "float32"
    directory: str = "runs/run"
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    validate_every: int = 0
    validate_bytes: int = 32_768
    sample_tokens: int = 200
    init_from: str | None = None
    init_optimizer: bool = False
    profile: tuple[int, int] | None = None
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "log_every", "save_every", "keep"):
            check_range(self, name, 1)
        check_range(self, "validate_bytes", 1)
        check_range(self, "seed", 0, 2**32 - 1)  # range accepted by grain
        check_range(self, "validate_every", 0)
        check_range(self, "sample_tokens", 0)
        check_range(self, "peak_flops", 0.0, open_low=True)
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) == "float16":
                allowed = (
                    "'float32' or 'bfloat16': float16 overflows above 65,504 and underflows below "
                    "6e-8, and training does not scale the loss"
                )
                raise_config_error("RunConfig", name, "float16", allowed)
            check_choice(self, name, ("float32", "bfloat16"))
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            allowed = "the first and the last step, 1 <= first <= last"
            raise_config_error("RunConfig", "profile", list(self.profile), allowed)
        if self.init_optimizer and self.init_from is None:
            raise_config_error(
                "RunConfig", "init_optimizer", True, "false if run.init_from is not set"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Raises:
        ValueError: a value is not allowed; the message has field, value and allowed values.
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
        if self.run.profile and self.run.profile[1] > self.run.steps:
            allowed = f"within run.steps = {self.run.steps}"
            raise_config_error("TrainConfig", "run.profile", list(self.run.profile), allowed)
        self._check_mesh()

    def _check_mesh(self) -> None:
        """Check that the sizes of the mesh, as far as they are known, divide batch and model."""
        mesh, layer = self.run.mesh.cpu_sizes, self.model.layer
        rows = "data" if mesh["fsdp"] == 1 else "fsdp" if mesh["data"] == 1 else "data * mesh.fsdp"
        for axis, size, name, divided in (
            (rows, mesh["data"] * mesh["fsdp"], "run.batch_size", self.run.batch_size),
            ("fsdp", mesh["fsdp"], "model.layer.d_model", layer.d_model),
            ("heads", mesh["heads"], "model.layer.num_heads", layer.num_heads),
            ("heads", mesh["heads"], "the feed-forward width", self.model.ffn_dim),
        ):
            if divided % size:
                allowed = f"a divisor of {name} = {divided}"
                raise_config_error("TrainConfig", f"run.mesh.{axis}", size, allowed)
        if mesh["context"] > 1:
            self._check_context(mesh["context"])

    def _check_context(self, devices: int) -> None:
        """Check that the model can split windows over devices."""
        layers, layer, allowed = self.model.block_layers, self.model.layer, ""
        segments, rest = divmod(self.data.max_tokens, layer.segment_size)
        carries = layer.state_init_mode == "checkpoint"
        if any(isinstance(other, LogLinearConfig) for other in layers):
            allowed = "1 for the mixer 'log_linear'"
        elif layer in layers and carries and not layer.memory.decay_only_transition:
            allowed = f"1 for state_init_mode = 'checkpoint' of a {layer.memory.kind} memory"
        elif layer in layers and self.data.task == "text" and (rest or segments % devices):
            segments_per_window = self.data.max_tokens / layer.segment_size
            allowed = f"a divisor of data.window / segment_size = {segments_per_window:g}"
        if allowed:
            raise_config_error("TrainConfig", "run.mesh.context", devices, allowed)

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the run's text.

        Raises:
            UserError: the task has no text.
        """
        if isinstance(self.data, MQARConfig):
            raise UserError(f"{self.run.directory}: data.task = 'mqar' has no text")
        return self.data.tokenizer


def from_dict(data: Any) -> TrainConfig:
    """Build a configuration from the output of `to_dict`; unknown keys are errors.

    Raises:
        ValueError: one line with the key's path, its value and what is allowed.
    """
    return serialization.from_dict(TrainConfig, data)
