"""Accuracy with confidence intervals."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mc_jax.sharding import split_rows, use_mesh_of
from train.distributed import to_host
from train.step import Tree, answer_losses
from train.tasks.examples import Draw, Example, stack

Z = 1.959963984540054  # the normal distribution's 97.5% quantile: 95% lie within
UNITS = {"mqar": "queries", "niah": "needles"}  # what is counted, by task


class Score(NamedTuple):
    """Numbers of correct and of all answers, and the mean loss in nats per token."""

    right: int
    asked: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy, for independent questions."""
        return wilson(self.right, self.asked)

    def as_dict(self) -> dict[str, float]:
        """Return plain values."""
        low, high = self.interval
        return {"accuracy": self.accuracy, "low": low, "high": high} | self._asdict()


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Return Wilson's 95% interval for `right` of `asked` (E. B. Wilson, 1927)."""
    share, square = right / asked, Z * Z / asked
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / asked + square / (4 * asked))
    return middle - half if right else 0.0, middle + half if right < asked else 1.0


class Answers(NamedTuple):
    """Scores of n examples with p answers each."""

    losses: np.ndarray  # float32 [n, p], nats
    right: np.ndarray  # bool [n, p]
    weights: np.ndarray  # [n, p], 0 where a row has fewer than p answers
    distances: np.ndarray  # int [n, p]: tokens from the value to the query

    def score(self, chosen: np.ndarray | None = None, *, whole: bool = False) -> Score:
        """Return the score of the selected answers.

        Args:
            chosen: bool [n, p], True for answers to count; None = all.
            whole: count examples, correct if all their answers are, instead of answers.
        """
        counted = self.weights > 0
        if chosen is not None:
            counted &= chosen
        loss = float(self.losses[counted].mean(dtype=np.float64))
        if whole:
            return Score(int((self.right | ~counted).all(1).sum()), len(self.right), loss)
        return Score(int(self.right[counted].sum()), int(counted.sum()), loss)


Answer = Callable[[Tree, Tree, Draw, str, int], Answers]


def make_answer(graphdef: nnx.GraphDef, rows: int) -> Answer:
    """Return a function that evaluates a model on examples.

    It maps parameters, other state, a `Draw`, a split and a number of examples to `Answers`.

    Args:
        graphdef: graph definition of the model.
        rows: batch size.
    """

    @jax.jit
    def of_batch(params: Tree, rest: Tree, batch: Example) -> tuple[jax.Array, jax.Array]:
        losses, right, _ = answer_losses(graphdef, params, rest, batch)
        return losses, right

    def answer(params: Tree, rest: Tree, draw: Draw, split: str, count: int) -> Answers:
        parts = []
        for start in range(0, count, rows):
            # Repeat the last example to fill the last batch, to avoid another compilation.
            index = np.minimum(start + np.arange(rows), count - 1)
            batch = stack([draw(split, int(i)) for i in index])
            with use_mesh_of(params):
                losses, right = of_batch(params, rest, split_rows(batch, params))
            losses, right = to_host((losses, right))
            fields = (losses, right, batch.weights, batch.places - batch.origins)
            parts.append([np.asarray(field)[: count - start] for field in fields])
        return Answers(*(np.concatenate(field) for field in zip(*parts, strict=True)))

    return answer


def join(parts: list[Answers]) -> Answers:
    """Concatenate answers, padding the answer axis with answers of weight 0."""
    width = max(part.right.shape[1] for part in parts)

    def wide(field: np.ndarray) -> np.ndarray:
        return np.pad(field, ((0, 0), (0, width - field.shape[1])))

    return Answers(
        *(np.concatenate([wide(x) for x in field]) for field in zip(*parts, strict=True))
    )
