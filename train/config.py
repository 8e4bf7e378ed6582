"""What a run is: frozen dataclasses, filled from YAML and `key=value` words, strictly."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_origin

import cattrs
import yaml
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mc_core import ModelConfig
from mc_core.checks import check_choice, check_range, fail
from mc_core.errors import UserError
from mc_core.memories import MEMORIES
from mc_core.optimizer import OptimizerConfig
from train.read import first_line, merge, read_with_bases
from train.tasks.config import Length, MQARConfig, NIAHConfig


@dataclass(frozen=True)
class TextConfig:
    """Text, every token of which is predicted from those before it: what `data` is by default.

    Attributes:
        corpus: files, folders, or the word `stdlib` (the running Python's standard library).
        tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
        separator: what stands between two documents: text, or the name of one of the tokenizer's
            special tokens; "" for nothing. None: the tokenizer's end-of-text token, if it has one
            that `train.separator` knows, else a newline where a document does not end with one.
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
            fail("TextConfig", "corpus", list(self.corpus), "at least one file or folder")
        for name in ("window", "validation_bytes", "train_bytes"):
            check_range(self, name, 1)
        check_range(self, "validation_fraction", 0.0, 1.0, open_low=True, open_high=True)
        try:
            (self.separator or "").encode()
        except UnicodeEncodeError:
            fail("TextConfig", "separator", self.separator, "text in UTF-8")

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
            fail("RunConfig", "devices", self.devices, allowed)
        check_range(self, "validate_bytes", 1)
        check_range(self, "seed", 0, 2**32 - 1)  # what grain takes
        check_range(self, "validate_every", 0)
        check_range(self, "sample_tokens", 0)
        check_choice(self, "dtype", ("float32", "bfloat16"))
        if self.init_optimizer and self.init_from is None:
            fail("RunConfig", "init_optimizer", True, "false where run.init_from is not set")


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
            fail("ModelConfig", "vocab_size", self.model.vocab_size, f">= {reason}")
        warmup = self.optimizer.warmup_steps
        if warmup >= self.run.steps:
            fail("OptimizerConfig", "warmup_steps", warmup, f"< run.steps = {self.run.steps}")

    @property
    def tokenizer(self) -> str:
        """The tokenizer of the run's text.

        Raises:
            UserError: the run knows no text.
        """
        if isinstance(self.data, MQARConfig):
            raise UserError(f"{self.run.directory}: a run on data.task = 'mqar' knows no text")
        return self.data.tokenizer


# Keys that change nothing about the parameters, roundings aside: a checkpoint resumes under other
# values of them.
FREE_KEYS = frozenset(
    f"run.{key}"
    for key in (
        "directory",
        "devices",
        "log_every",
        "save_every",
        "keep",
        "validate_every",
        "validate_bytes",
        "sample_tokens",
    )
)
TAG = re.compile(r"model\.layer\.memory\.kind=|data\.task=")
SECTIONS = {
    "TrainConfig": "",
    **{task.__name__: "data" for task in TASKS.values()},
    "OptimizerConfig": "optimizer",
    "RunConfig": "run",
    "ModelConfig": "model",
    "MCConfig": "model.layer",
    "AttentionConfig": "model.layer",
    **{memory.__name__: "model.layer.memory" for memory in MEMORIES.values()},
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, the files that its `base` key names, and `key=value` words on top.

    A `base` is looked up beside the file that names it.

    Raises:
        UserError: the file cannot be read, or a key or value is not allowed; names it.
    """
    defaults = OmegaConf.create({"run": {"directory": f"runs/{path.stem}"}})
    merged = merge(defaults, read_with_bases(path), path)
    # A word that replaces a whole memory or task comes before those that say more about it.
    for word in sorted(overrides, key=lambda word: not TAG.match(word)):
        if "=" not in word:
            raise UserError(f"{word}: must have the form key=value")
        try:
            merged = merge(merged, OmegaConf.from_dotlist([word]), word)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{word}: {first_line(error)}") from error
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    try:
        return from_dict(plain)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def from_dict(data: Any) -> TrainConfig:
    """Build from `to_dict`'s form, strictly.

    Raises:
        ValueError: one line with the key's path, its value and what is allowed.
    """
    try:
        return _converter().structure(data, TrainConfig)
    except ClassValidationError as error:
        raise ValueError(_message(error)) from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return plain values."""
    return _converter().unstructure(config)


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key that trains another model, with both values, or None."""
    left, right = _flatten(old), _flatten(new)
    for key in sorted(left.keys() | right.keys()):
        if key not in FREE_KEYS and left.get(key) != right.get(key):
            return key, left.get(key), right.get(key)
    return None


def _flatten(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    items: dict[str, Any] = {}
    for key, value in data.items():
        items |= _flatten(value, f"{path}.{key}" if path else key)
    return items


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _structure_plain)
    converter.register_structure_hook_func(lambda t: t == tuple[str, ...], _structure_words)
    converter.register_structure_hook_func(_is_lengths, _structure_lengths)
    converter.register_structure_hook_func(lambda t: t == DataConfig, _structure_task(converter))
    converter.register_unstructure_hook_func(
        lambda t: t == DataConfig, _unstructure_task(converter)
    )
    converter.register_structure_hook(ModelConfig, lambda data, _: ModelConfig.from_dict(data))
    converter.register_unstructure_hook(ModelConfig, ModelConfig.to_dict)
    converter.register_unstructure_hook_func(lambda t: get_origin(t) is tuple, _to_list)
    for kind in (int, float, str):
        converter.register_structure_hook(kind | None, _structure_optional)
    return converter


def _structure_task(converter: cattrs.Converter) -> Callable[[Any, Any], DataConfig]:
    def structure(data: Any, _: Any) -> DataConfig:
        if not isinstance(data, dict):
            raise ValueError("must be a mapping of keys")
        task = data.get("task", TextConfig.task)
        if not isinstance(task, str) or task not in TASKS:
            fail("TextConfig", "task", task, "one of " + ", ".join(map(repr, TASKS)))
        rest = {key: value for key, value in data.items() if key != "task"}
        return converter.structure(rest, TASKS[task])

    return structure


def _unstructure_task(converter: cattrs.Converter) -> Callable[[DataConfig], dict[str, Any]]:
    def unstructure(data: DataConfig) -> dict[str, Any]:
        # Text goes without saying: so it stands in the checkpoints of runs that knew no other task.
        tag = {} if isinstance(data, TextConfig) else {"task": data.task}
        return tag | converter.unstructure(data, type(data))

    return unstructure


def _to_list(value: Any) -> Any:
    return [_to_list(item) for item in value] if isinstance(value, tuple) else value


def _structure_plain(value: object, kind: type) -> Any:
    wrong = isinstance(value, bool) != (kind is bool) or not isinstance(
        value, (int, float) if kind is float else kind
    )
    if wrong:
        raise ValueError(f"= {value!r}: must be of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"= {value!r}: must be finite")
    return kind(value)


def _structure_optional(value: object, union: Any) -> Any:
    return None if value is None else _structure_plain(value, union.__args__[0])


def _structure_words(value: object, _: type) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"= {value!r}: must be a path, the word stdlib, or a list of them")
    return tuple(words)


def _is_lengths(kind: Any) -> bool:
    return kind in (tuple[int, ...], tuple[Length, ...])


def _structure_lengths(value: object, kind: Any) -> tuple[Any, ...]:
    def whole(item: object) -> bool:
        return isinstance(item, int) and not isinstance(item, bool)

    def pair(item: object) -> bool:
        return isinstance(item, list) and len(item) == 2 and all(map(whole, item))

    pairs = kind == tuple[Length, ...]
    if not isinstance(value, list) or not all(map(pair if pairs else whole, value)):
        what = "[tokens, pairs], each a list of two integers" if pairs else "numbers of tokens"
        raise ValueError(f"= {value!r}: must be a list of {what}")
    return tuple(tuple(item) if pairs else item for item in value)


def _message(error: ClassValidationError) -> str:
    """Return the first fault of a tree of them as `key.path = value: must be ...`."""
    where = ""
    cause: BaseException = error
    while isinstance(cause, ClassValidationError):
        fault = cause.exceptions[0]
        names = [n.name for n in getattr(fault, "__notes__", []) if hasattr(n, "name")]
        where, cause = ".".join(filter(None, [where, *names])), fault
    if isinstance(cause, ForbiddenExtraKeysError):
        allowed = ", ".join(f.name for f in dataclasses.fields(cause.cl))
        key = min(cause.extra_fields, key=str)
        return f"{where + ': ' if where else ''}unknown key {key!r}; allowed are {allowed}"
    if isinstance(cause, KeyError):
        return f"{where}: key is missing"
    text = str(cause)
    if text.startswith("= "):
        return f"{where} {text}"
    owner = re.match(r"\w+", text)
    if owner and owner[0] in SECTIONS:
        return f"{SECTIONS[owner[0]]}{text[owner.end() :]}".lstrip(".: ")
    return f"{where} must be a mapping of keys" if where else text
