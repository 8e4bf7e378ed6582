"""Windows of tokens, and batches with a checkpointable position."""

from typing import SupportsIndex

import grain
import numpy as np

from train.config import RunConfig, TextConfig


class Windows(grain.sources.RandomAccessDataSource):
    """Consecutive windows of `size + 1` tokens; neighbours share one, so each is predicted once."""

    def __init__(self, tokens: np.ndarray, size: int):
        self._tokens = tokens
        self._size = size

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._size

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        start = int(index) * self._size
        return self._tokens[start : start + self._size + 1].astype(np.int32)


def make_batches(tokens: np.ndarray, data: TextConfig, run: RunConfig) -> grain.DatasetIterator:
    """Iterate without end over [accumulation, batch_size, window + 1] int32 batches.

    Every epoch visits all windows once, in a new order that depends on the seed.
    Grain's checkpoint handler saves and restores the position.
    """
    windows, rows = Windows(tokens, data.window), run.accumulation * run.batch_size
    return iter(
        grain.MapDataset.source(windows)
        .shuffle(seed=run.seed)
        # More epochs than any run has; fits an index. None would overflow with one row.
        .repeat(2**48 // len(windows))
        .batch(rows)
        .map(lambda rows: rows.reshape(run.accumulation, run.batch_size, data.window + 1))
        # A window is a slice of memory: threads would cost more than they save.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
