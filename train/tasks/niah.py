"""Needle in a haystack: S-NIAH of RULER (arXiv:2404.06654), with different wording.

A long text (the haystack) contains one sentence with a value (the needle). It ends with a question
for the value, and the answer. Example of noise and a number, at the second of five depths:

    The river is slow. A door is open. One of the special magic numbers for quiet-harbor is:
    4720851. Nobody is in a hurry. ... The clock has stopped.
    What is the special magic number for quiet-harbor? It is: 4720851

Only the tokens of the last 4720851 are predicted. Haystack, needle, question and answer are encoded
separately, so that lengths and depths are exact in tokens for any tokenizer.
"""

import hashlib
import re
import uuid
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mc_core.errors import UserError
from train.config.recall_schema import NIAHConfig
from train.data.documents import clip, distinct, read_documents, split
from train.data.tokenizer import Encode, load_encoder
from train.tasks.examples import Draw, Example, generator

NOISE = (
    "The river is slow. ",
    "A door is open. ",
    "Nobody is in a hurry. ",
    "The clock has stopped. ",
    "Rain falls on the hills, and then it does not. ",
)
FIRST = (  # noqa: SIM905
    "amber autumn brave bright calm clever copper crimson distant eager early faint gentle golden "
    "hidden hollow humble idle ivory jolly keen little lively lonely mellow misty narrow noble old "
    "patient plain proud quiet rapid rustic silent silver solemn swift wild"
).split()
SECOND = (  # noqa: SIM905
    "anchor apple arrow barrel basket beacon bridge candle canyon castle cedar cloud compass "
    "cottage feather forest garden glacier harbor island kettle ladder lantern meadow mirror "
    "mountain orchard pebble pepper pillow ribbon saddle sparrow spoon tunnel valley violin wagon "
    "whistle window"
).split()
TYPES = {"number": "number", "uuid": "UUID"}
SENTENCE_END = re.compile(rb"[.!?]\s+|\n\s*")
ESSAY_BYTES = 2**22  # maximum size of a corpus, to limit the tokenization time


@dataclass(frozen=True)
class Haystack:
    """Tokenized haystack text.

    Attributes:
        tokens: int32 [n].
        starts: [m] starts of sentences or lines, including 0.
    """

    tokens: np.ndarray
    starts: np.ndarray

    def cut(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return `length` tokens from the start of a random sentence, and the starts of sentences.

        Short texts are repeated. The start and the end of the result count as sentence starts.
        """
        start = int(rng.choice(self.starts))
        size = len(self.tokens)
        rounds = np.arange(-(-(start + length) // size))[:, None] * size
        starts = (rounds + self.starts).ravel() - start
        inside = starts[(starts >= 0) & (starts < length)]
        return self.tokens.take(np.arange(start, start + length), mode="wrap"), np.append(
            inside, length
        )


class Needles:
    """Draws examples from the haystacks of training and held-out text.

    Args:
        config: configuration of the task.
        vocab_size: vocabulary size of the model.
        seed: random seed of all examples.

    Raises:
        UserError: the corpus or the tokenizer cannot be used, or a length is too short.
    """

    def __init__(self, config: NIAHConfig, vocab_size: int, seed: int):
        self._config = config
        self._seed = seed
        self._encode = load_encoder(config.tokenizer, vocab_size)
        train, held_out = load_haystacks(config, self._encode)
        self._haystacks = {"train": train, "validation": held_out, "test": held_out}
        parts = [part.tokens for part in (train, held_out)]
        self.fingerprint = "-".join(hashlib.sha256(x.tobytes()).hexdigest() for x in parts)

    def draw(self, length: int, depth: int | None = None) -> Draw:
        """Return a function that maps a split and an index to an example of `length` tokens.

        Args:
            length: number of input tokens; includes the answer without its last token.
            depth: depth of the needle, 0 to `depths` - 1; None: random.

        Raises:
            UserError: the length is too short for needle, question and answer, or the tokenizer
                cannot encode the answer.
        """
        config = self._config
        first, second = (max(words, key=len) for words in (FIRST, SECOND))
        longest = {"number": "7" * 7, "uuid": str(uuid.UUID(int=0))}[config.value]
        _haystack_size(length, self._pieces(f"{first}-{second}", longest))
        # A tokenizer makes at most one token per byte, plus one at the start.
        slots = len(f" {longest}") + (config.tokenizer != "bytes")

        def example(split: str, index: int) -> Example:
            rng = generator(self._seed, split, length, 0 if depth is None else depth + 1, index)
            names = [words[rng.integers(len(words))] for words in (FIRST, SECOND)]
            value = str(rng.integers(10**6, 10**7))
            if config.value == "uuid":
                value = str(uuid.UUID(bytes=rng.bytes(16), version=4))
            pieces = self._pieces("-".join(names), value)
            needle, question, answer = pieces
            size = _haystack_size(length, pieces)
            at = int(rng.integers(config.depths)) if depth is None else depth
            hay, starts = self._haystacks[split].cut(size, rng)
            target = size * at / max(config.depths - 1, 1)
            origin = int(starts[np.abs(starts - target).argmin()])
            whole = np.concatenate([hay[:origin], needle, hay[origin:], question, answer])
            return _make_example(whole, len(answer), origin, slots)

        return example

    def _pieces(self, key: str, value: str) -> list[np.ndarray]:
        """Return the tokens of the needle, the question and the answer."""
        kind = TYPES[self._config.value]
        texts = (
            f"One of the special magic {kind}s for {key} is: {value}. ",
            f"\nWhat is the special magic {kind} for {key}? It is:",
            f" {value}",
        )
        if not len(self._encode(value.encode())):
            tokenizer = self._config.tokenizer
            raise UserError(f"data.tokenizer = {tokenizer}: must have tokens for {value!r}")
        return [self._encode(text.encode()).astype(np.int32) for text in texts]


def load_haystacks(config: NIAHConfig, encode: Encode) -> tuple[Haystack, Haystack]:
    """Return the haystacks of training and of held-out examples; both are equal for noise.

    Raises:
        UserError: the corpus or the tokenizer cannot be used.
    """
    if config.haystack == "noise":
        noise = make_haystack([sentence.encode() for sentence in NOISE], encode)
        if not len(noise.tokens):
            raise UserError(
                f"data.tokenizer = {config.tokenizer}: must have tokens for {NOISE[0]!r}"
            )
        return noise, noise
    sides = split(distinct(read_documents(config.corpus)), config.validation_fraction, 0)
    haystacks = []
    for side in sides:
        text = clip(b"\n".join(side), ESSAY_BYTES)
        borders = [0, *(found.end() for found in SENTENCE_END.finditer(text)), len(text)]
        sentences = [text[begin:end] for begin, end in pairwise(borders)]
        haystacks.append(make_haystack(sentences, encode))
        if not len(haystacks[-1].tokens):
            names = ", ".join(config.corpus)
            raise UserError(
                f"data.corpus = {names}: too little text for haystacks: use a larger corpus"
            )
    return haystacks[0], haystacks[1]


def make_haystack(sentences: list[bytes], encode: Encode) -> Haystack:
    """Encode sentences one by one."""
    encoded = [encode(sentence).astype(np.int32) for sentence in sentences]
    encoded = [tokens for tokens in encoded if len(tokens)]
    starts = np.cumsum([0, *map(len, encoded)])[:-1]
    return Haystack(np.concatenate([np.zeros(0, np.int32), *encoded]), starts)


def _haystack_size(length: int, pieces: list[np.ndarray]) -> int:
    """Return the number of haystack tokens in an example of `length` tokens.

    Raises:
        UserError: the length is too short.
    """
    # The answer's last token is only a label.
    needed = sum(map(len, pieces)) - 1
    if length <= needed:
        raise UserError(
            f"data.lengths = {length}: must be > {needed}, the tokens of needle, question, answer"
        )
    return length - needed


def _make_example(whole: np.ndarray, asked: int, origin: int, slots: int) -> Example:
    """Return an example that predicts the last `asked` tokens of `whole` [t + 1].

    Answers are padded to `slots`.
    """
    places = np.zeros(slots, np.int32)
    labels, weights = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
    places[:asked] = np.arange(len(whole) - asked, len(whole)) - 1
    labels[:asked], weights[:asked] = whole[-asked:], 1.0
    origins = np.full(slots, origin, np.int32)
    return Example(whole[:-1].astype(np.int32), places, labels, weights, origins)
