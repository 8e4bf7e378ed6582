"""Configurations of the recall tasks, named by `data.task` of a run."""

from dataclasses import dataclass
from typing import ClassVar

from mc_core.checks import check_choice, check_range, raise_config_error
from mc_core.serialization import Tag

Length = tuple[int, int]
TASKS: dict[str, type] = {}  # configurations of `data`, by `data.task`
# Checkpoints of text runs have no `task`.
TAG = Tag("task", TASKS, omitted="text")


@dataclass(frozen=True)
class MQARConfig:
    """Multi-query associative recall, as zoology defines it (arXiv:2312.04927); see `mqar`.

    Attributes:
        vocab_size: token ids; keys are in the lower half, values in the upper.
        lengths: (tokens, pairs) of the training examples; batches alternate between them.
        power: exponent a of the gap distribution a·x^(a - 1); small values give short gaps.
        random_non_queries: fill positions other than pairs and queries with random tokens, else 0.
        examples: distinct training examples of each length; an epoch visits each once.
        validation_examples: held-out examples of each length.

    Raises:
        ValueError: a value is not allowed; the message has field, value and allowed values.
    """

    tag: ClassVar[Tag] = TAG
    task: ClassVar[str] = "mqar"

    vocab_size: int = 8192
    lengths: tuple[Length, ...] = ((64, 4), (128, 8), (256, 16), (512, 64))
    power: float = 0.01
    random_non_queries: bool = True
    examples: int = 100_000
    validation_examples: int = 500

    def __post_init__(self) -> None:
        check_range(self, "vocab_size", 4)
        check_range(self, "power", 0.0, open_low=True)
        for name in ("examples", "validation_examples"):
            check_range(self, name, 1)
        if not self.lengths:
            raise_config_error("MQARConfig", "lengths", [], "at least one [tokens, pairs]")
        for length in self.lengths:
            self.check_length(length)

    def check_length(self, length: Length) -> None:
        """Check (tokens, pairs).

        Raises:
            ValueError: the queries do not fit into the tokens, or the keys into the vocabulary.
        """
        tokens, pairs = length
        if pairs < 1 or tokens < 4 * pairs:
            allowed = "[tokens, pairs] with pairs >= 1 and tokens >= 4 pairs"
            raise_config_error("MQARConfig", "lengths", list(length), allowed)
        if pairs > self.vocab_size // 2 - 1:
            allowed = f"< {self.vocab_size // 2} pairs: keys are half of the {self.vocab_size} ids"
            raise_config_error("MQARConfig", "lengths", list(length), allowed)

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per example, over the lengths."""
        return sum(tokens for tokens, _ in self.lengths) / len(self.lengths)

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest example."""
        return max(tokens for tokens, _ in self.lengths)

    @property
    def min_vocab_size(self) -> int:
        """Minimum `model.vocab_size`."""
        return self.vocab_size


@dataclass(frozen=True)
class NIAHConfig:
    """One needle in a haystack: S-NIAH-1, 2 and 3 in RULER's form (arXiv:2404.06654); see `niah`.

    S-NIAH-1 is `noise` and `number`, S-NIAH-2 `essay` and `number`, S-NIAH-3 `essay` and `uuid`.

    Attributes:
        haystack: `noise`, repeated sentences, or `essay`, the text of `corpus`.
        value: content of the needle: `number`, of 7 digits, or `uuid`.
        lengths: numbers of tokens of training examples, including the answer; batches alternate
            between them.
        depths: number of depths, evenly spaced from the haystack's start to its end.
        corpus: files, folders, `stdlib` or `site-packages`; the haystack of `essay`, at most 4 MiB
            of it.
        tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`.
        validation_fraction: share of the corpus reserved for held-out examples.
        examples: distinct training examples of each length; an epoch visits each once.
        validation_examples: held-out examples of each length.

    Raises:
        ValueError: a value is not allowed; the message has field, value and allowed values.
    """

    tag: ClassVar[Tag] = TAG
    task: ClassVar[str] = "niah"

    haystack: str = "noise"
    value: str = "number"
    lengths: tuple[int, ...] = (512,)
    depths: int = 40
    corpus: tuple[str, ...] = ("stdlib",)
    tokenizer: str = "bytes"
    validation_fraction: float = 0.05
    examples: int = 100_000
    validation_examples: int = 100

    def __post_init__(self) -> None:
        check_choice(self, "haystack", ("noise", "essay"))
        check_choice(self, "value", ("number", "uuid"))
        for name in ("depths", "examples", "validation_examples"):
            check_range(self, name, 1)
        check_range(self, "validation_fraction", 0.0, 1.0, open_low=True, open_high=True)
        if not self.lengths or min(self.lengths) < 1:
            raise_config_error(
                "NIAHConfig", "lengths", list(self.lengths), "at least one number of tokens"
            )
        if not self.corpus:
            raise_config_error(
                "NIAHConfig", "corpus", list(self.corpus), "at least one file or folder"
            )

    @property
    def mean_tokens(self) -> float:
        """Mean number of tokens per example, over the lengths."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def max_tokens(self) -> int:
        """Number of tokens of the longest example."""
        return max(self.lengths)

    @property
    def min_vocab_size(self) -> int:
        """Lower bound of `model.vocab_size`; 1 until the tokenizer file is loaded."""
        return 256 if self.tokenizer == "bytes" else 1
