"""Windows of tokens, and batches with checkpointable iterators."""

import math
from collections.abc import Sequence
from typing import SupportsIndex

import grain
import numpy as np

from train.config import RunConfig, TextConfig
from train.data.mixture import Mixture
from train.data.share import share_rows
from train.data.sources import Part, Tokens

EPOCHS = 2**48  # elements; more than any run needs. An infinite repeat overflows the index


class Windows(grain.sources.RandomAccessDataSource):
    """Windows of `size + 1` tokens, overlapping by one, so that each token is predicted once.

    Args:
        tokens: tokens in memory, or shards that are read on demand.
        size: predicted tokens per window.
        part: range of the tokens; None = all.
    """

    def __init__(self, tokens: Tokens, size: int, part: Part | None = None):
        self._tokens = tokens
        self._size = size
        self._start, self._stop = (0, len(tokens)) if part is None else part[:2]

    def __len__(self) -> int:
        return (self._stop - self._start - 1) // self._size

    def __getitem__(self, index: SupportsIndex) -> np.ndarray:
        start = self._start + int(index) * self._size
        return self._tokens[start : start + self._size + 1].astype(np.int32)


def make_batches(
    tokens: Tokens,
    data: TextConfig,
    run: RunConfig,
    own: Sequence[int] | None = None,
    parts: Sequence[Part] = (),
) -> grain.DatasetIterator:
    """Return an infinite iterator over int32 batches [accumulation, batch_size, window + 1].

    Every epoch visits all windows once, in a new order that depends on the seed. Parts with
    weights have epochs of their own.
    Grain's checkpoint handler saves and restores the position.

    Args:
        tokens: tokens in memory, or shards that are read on demand.
        data: configuration of the text.
        run: configuration with seed, batch size and accumulation.
        own: rows of each microbatch that this process reads; None = all.
        parts: parts of the tokens with their shares of the windows; empty = all tokens.
    """
    orders = [
        _shuffled(Windows(tokens, data.window, part), run.seed + number)
        for number, part in enumerate(parts or [None])
    ]
    mixed = (
        orders[0]
        if len(orders) == 1
        else grain.MapDataset.source(Mixture(orders, [part.weight for part in parts]))
    )
    dataset, shape = share_rows(mixed, run, own)
    return iter(
        dataset.batch(math.prod(shape))
        .map(lambda rows: rows.reshape(*shape, data.window + 1))
        # Slicing memory is cheaper than handing windows to threads.
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def _shuffled(windows: Windows, seed: int) -> grain.MapDataset:
    """Return the windows in infinitely many epochs, each in another order."""
    dataset = grain.MapDataset.source(windows).shuffle(seed=seed % 2**32)
    return dataset.repeat(EPOCHS // len(windows))
