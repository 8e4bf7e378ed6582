"""Blocks of tokens, the records of a shard.

A shard is an array_record file. Each of its records has the next `BLOCK` tokens of the shard, the
last one fewer, so the record of a token follows from its index. A record is

    number of documents that start in the block    uint32, little-endian
    their positions in the block                   uint32 each
    tokens                                         uint16 or uint32 each
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

BLOCK = 8192  # tokens
INDEX = np.dtype("<u4")
# Uncompressed records of one token block each are fast to read in random order.
WRITER_OPTIONS = "group_size:1,uncompressed"


class Block(NamedTuple):
    """The tokens of a record.

    Attributes:
        tokens: uint16 or uint32 [t].
        starts: uint32 [n], positions in the block at which documents start.
    """

    tokens: np.ndarray
    starts: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of the tokens of a vocabulary: uint16 up to 65,536 tokens, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def pack_block(block: Block, dtype: np.dtype) -> bytes:
    """Return the record of a block."""
    starts = block.starts.astype(INDEX)
    count = np.array([len(starts)], INDEX)
    return count.tobytes() + starts.tobytes() + block.tokens.astype(dtype).tobytes()


def unpack_block(record: bytes, dtype: np.dtype) -> Block:
    """Return the block of a record; its arrays are views of the record."""
    count = int(np.frombuffer(record, INDEX, 1)[0])
    starts = np.frombuffer(record, INDEX, count, INDEX.itemsize)
    return Block(np.frombuffer(record, dtype, offset=(1 + count) * INDEX.itemsize), starts)


class BlockWriter:
    """Writes the tokens of consecutive documents as a shard.

    Args:
        path: the new file.
        dtype: dtype of the tokens.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        self._dtype = dtype
        self._pending: list[np.ndarray] = []
        self._starts: list[int] = []  # in the pending tokens
        self._size = 0  # number of pending tokens
        self.tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append the tokens of a document, including its separator."""
        self._starts.append(self._size)
        self._pending.append(tokens.astype(self._dtype))
        self._size += len(tokens)
        self.tokens += len(tokens)
        if self._size >= BLOCK:
            self._write(self._size - self._size % BLOCK)

    def close(self) -> None:
        """Write the last block, and close the file."""
        self._write(self._size)
        self._writer.close()

    def _write(self, stop: int) -> None:
        """Write the first `stop` pending tokens."""
        tokens = np.concatenate([np.zeros(0, self._dtype), *self._pending])
        starts = np.array(self._starts, np.int64)
        for first in range(0, stop, BLOCK):
            last = min(first + BLOCK, stop)
            inside = starts[(first <= starts) & (starts < last)] - first
            self._writer.write(pack_block(Block(tokens[first:last], inside), self._dtype))
        self._pending, self._size = [tokens[stop:]], self._size - stop
        self._starts = [start - stop for start in self._starts if start >= stop]
