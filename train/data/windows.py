"""Windows of tokens, and batches with checkpointable iterators."""

import math
from collections.abc import Sequence
from typing import SupportsIndex

import grain
import numpy as np

from train.config import RunConfig, TextConfig
from train.data.share import share_rows


class Windows(grain.sources.RandomAccessDataSource):
    """Windows of `size + 1` tokens, overlapping by one, so that each token is predicted once."""

    def __init__(self, tokens: np.ndarray, size: int):
        self._tokens = tokens
        self._size = size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._size

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        start = int(index) * self._size
        return self._tokens[start : start + self._size + 1].astype(np.int32)


def make_batches(
    tokens: np.ndarray, data: TextConfig, run: RunConfig, own: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Return an infinite iterator over int32 batches [accumulation, batch_size, window + 1].

    `own` are the rows of each microbatch that this process reads; None = all.

    Every epoch visits all windows once, in a new order that depends on the seed.
    Grain's checkpoint handler saves and restores the position.
    """
    windows = Windows(tokens, data.window)
    dataset, shape = share_rows(
        grain.MapDataset.source(windows)
        .shuffle(seed=run.seed)
        # More epochs than any run needs. None (infinite) overflows the index with a single row.
        .repeat(2**48 // len(windows)),
        run,
        own,
    )
    return iter(
        dataset.batch(math.prod(shape))
        .map(lambda rows: rows.reshape(*shape, data.window + 1))
        # Slicing memory is cheaper than handing windows to threads.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
