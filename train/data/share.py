"""The share of a process in an infinite data set of global batches."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain

from train.config import RunConfig


class Share(grain.sources.RandomAccessDataSource):
    """Selects the same rows of every global batch.

    Args:
        dataset: rows in the order of the global batches.
        rows: indices of the selected rows in a global batch.
        batch: number of rows of a global batch.
    """

    def __init__(self, dataset: grain.MapDataset, rows: Sequence[int], batch: int):
        self._dataset, self._rows, self._batch = dataset, rows, batch

    def __len__(self) -> int:
        return len(self._dataset) // self._batch * len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Any:
        number, row = divmod(int(index), len(self._rows))
        return self._dataset[number * self._batch + self._rows[row]]


def share_rows(
    dataset: grain.MapDataset, run: RunConfig, rows: Sequence[int] | None
) -> tuple[grain.MapDataset, tuple[int, int]]:
    """Return the rows of this process, and its shape of a batch: [accumulation, rows].

    The position in the result counts batches, and does not depend on the number of processes.

    Args:
        dataset: rows in the order of the global batches.
        run: configuration with batch size and accumulation.
        rows: this process's rows of a microbatch; None = all.
    """
    if rows is None:
        return dataset, (run.accumulation, run.batch_size)
    starts = range(0, run.accumulation * run.batch_size, run.batch_size)
    selected = [start + row for start in starts for row in rows]
    share = Share(dataset, selected, run.accumulation * run.batch_size)
    return grain.MapDataset.source(share), (run.accumulation, len(rows))
