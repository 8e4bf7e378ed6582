"""Tokens of shards, read on demand."""

from collections.abc import Sequence
from pathlib import Path

import jax  # noqa: F401  import before grain: without jax, grain only logs a warning

# isort: split
import grain
import numpy as np

from train.shards.blocks import BLOCK, Block, token_dtype, unpack_block
from train.shards.manifest import Manifest


class TokenShards:
    """The tokens of shards in order; has a length, and slices are arrays [t].

    Files are opened when they are first read, and only the blocks of a slice are read, so memory
    does not depend on the number of tokens. Threads may read at the same time.

    Args:
        folders: folders with their manifests; all have the same tokenizer.
    """

    def __init__(self, folders: Sequence[tuple[Path, Manifest]]):
        files = [(folder, file) for folder, manifest in folders for file in manifest.shards]
        counts = np.array([file.tokens for _, file in files], np.int64)
        blocks = -(-counts // BLOCK)
        self._dtype = token_dtype(folders[0][1].vocab_size)
        self._ends = np.cumsum(counts)  # of the shards, in tokens
        self._begins = self._ends - counts
        self._first_blocks = np.cumsum(blocks) - blocks
        # With the number of records, the source needs not open the files to count them.
        paths = [
            f"{folder / file.name}[0:{count}]"
            for (folder, file), count in zip(files, blocks, strict=True)
        ]
        self._records = grain.sources.ArrayRecordDataSource(paths)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        # Grain includes it in the state of an iterator.
        return f"TokenShards(tokens={len(self)})"

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise ValueError(f"step = {step}: must be 1")
        parts = [np.zeros(0, self._dtype)]
        while start < stop:
            begin, block = self._block_at(start)
            parts.append(block.tokens[start - begin : stop - begin])
            start = begin + len(block.tokens)
        return np.concatenate(parts)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Return the indices in [start, stop) of the first tokens of documents, int64."""
        parts = [np.zeros(0, np.int64)]
        position = start
        while position < min(stop, len(self)):
            begin, block = self._block_at(position)
            parts.append(begin + block.starts.astype(np.int64))
            position = begin + len(block.tokens)
        found = np.concatenate(parts)
        return found[(start <= found) & (found < stop)]

    def _block_at(self, index: int) -> tuple[int, Block]:
        """Return the block of a token, and the index of its first token."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        number = (index - int(self._begins[shard])) // BLOCK
        record = self._records[int(self._first_blocks[shard]) + number]
        return int(self._begins[shard]) + number * BLOCK, unpack_block(record, self._dtype)
