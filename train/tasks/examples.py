"""Examples of recall tasks, and batches with checkpointable iterators."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, SupportsIndex

import grain
import numpy as np

from train.config import RunConfig
from train.data.share import share_rows

SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """A sequence with its queries; batches have leading axes."""

    tokens: np.ndarray  # int32 [t]
    places: np.ndarray  # int32 [p]: positions of the queries
    labels: np.ndarray  # int32 [p]: correct next tokens
    weights: np.ndarray  # float32 [p]: 1, or 0 where a row has fewer than p answers
    origins: np.ndarray  # int32 [p]: position of the value in the sequence


Draw = Callable[[str, int], Example]  # (split, index) -> an example


def generator(seed: int, split: str, *index: int) -> np.random.Generator:
    """Return the random generator of one example, independent of other examples."""
    return np.random.default_rng((seed, SPLITS.index(split), *index))


def stack(examples: Sequence[Example]) -> Example:
    """Return a batch of examples of one length."""
    return Example(*(np.stack(field) for field in zip(*examples, strict=True)))


def pad_answers(draw: Draw, slots: int) -> Draw:
    """Return a function that draws the same examples, padded to `slots` answers.

    Padding has weight 0. All batches of one length then share one compilation.
    """

    def wide(split: str, index: int) -> Example:
        tokens, *answers = draw(split, index)
        return Example(tokens, *(np.pad(x, (0, slots - len(x))) for x in answers))

    return wide


class Examples(grain.sources.RandomAccessDataSource):
    """Training examples of one length, drawn on access."""

    def __init__(self, draw: Draw, count: int):
        self._draw = draw
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self._draw("train", int(index))


def make_batches(
    draws: Sequence[Draw], count: int, run: RunConfig, own: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Return an infinite iterator over batches [accumulation, batch_size, ...]; lengths alternate.

    Every epoch visits the `count` examples of a length once, in a new order that depends
    on the seed. Grain's checkpoint handler saves and restores the position.

    Args:
        draws: for each length, a function that draws an example.
        count: number of distinct examples per length.
        run: configuration with batch size, accumulation and seed.
        own: the rows of each microbatch that this process reads; None = all.
    """

    def of_length(number: int, draw: Draw) -> grain.MapDataset:
        examples = (
            grain.MapDataset.source(Examples(draw, count))
            .shuffle(seed=(run.seed + number) % 2**32)
            .repeat(2**48 // count)
        )
        dataset, shape = share_rows(examples, run, own)

        def split(batch: Example) -> Example:
            return Example(*(field.reshape(*shape, *field.shape[1:]) for field in batch))

        return dataset.batch(math.prod(shape), batch_fn=stack).map(split)

    lengths = [of_length(number, draw) for number, draw in enumerate(draws)]
    return iter(
        grain.MapDataset.mix(lengths).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
    )
