"""The streaming state of a language model as a cache of Hugging Face transformers."""

from typing import Any

from transformers.cache_utils import Cache

from mc_core.generation import bucket
from mc_torch.cache import AnyCache
from mc_torch.cache_rows import Rows, take_rows
from mc_torch.model import LanguageModel
from mc_torch.numerics import Array, Dtype


class StreamCache(Cache):
    """Caches of all blocks, from `LanguageModel.init_cache`; they grow as tokens arrive.

    Pass it as `past_key_values`, which newer versions of transformers name `cache`.

    Args:
        cache_dtype: dtype of the cached memories; None = that of the online memory.
        cache_device: storage of cached memories, `device` or `host`.

    Attributes:
        states: cache of each block; None before the first token.
        columns: number of columns of the inputs so far, including padding.
    """

    def __init__(self, *, cache_dtype: Dtype = None, cache_device: str = "device"):
        super().__init__(layers=[])
        self.states: tuple[AnyCache, ...] | None = None
        self.columns = 0
        self._options: dict[str, Any] = {"cache_dtype": cache_dtype, "cache_device": cache_device}

    def reserve(self, model: LanguageModel, batch: int, tokens: int) -> tuple[AnyCache, ...]:
        """Return the state, with capacity for the next tokens.

        Args:
            model: the model that the state belongs to.
            batch: number of rows.
            tokens: number of columns of the next call.
        """
        capacity = bucket(self.columns + tokens)
        if self.states is None:
            self.states = model.init_cache(batch, capacity, **self._options)
            self._capacity = capacity
        elif self.columns + tokens > self._capacity:
            self.states = model.grow(self.states, capacity)
            self._capacity = capacity
        return self.states

    def advance(self, states: tuple[AnyCache, ...], columns: int) -> None:
        """Store the state of each block after the next columns of the inputs."""
        self.states = states
        self.columns += columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns of the inputs so far, including padding."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the capacity grows as needed."""
        return -1

    def select(self, rows: Rows) -> None:
        """Keep the streams of the given rows, integers [r]; rows may be repeated."""
        if self.states is not None:
            self.states = take_rows(self.states, rows)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep the streams of the selected beams, integers [b]."""
        self.select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the streams of the given rows, integers [r] or bool [b]."""
        self.select(indices.nonzero()[:, 0] if str(indices.dtype) == "torch.bool" else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        if self.states is not None:
            self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def crop(self, *args: Any) -> None:
        """Raise an error: a memory cannot forget its latest tokens.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a StreamCache cannot be cropped: use the state before the call")

    def reset(self) -> None:
        """Remove all streams."""
        self.states, self.columns = None, 0

    def __len__(self) -> int:
        return len(self.states or ())

    def __repr__(self) -> str:
        kinds = ", ".join(type(state).__name__ for state in self.states or ())
        return f"StreamCache(columns={self.columns}, states=({kinds}))"

    @property
    def position(self) -> Array | None:
        """Number of tokens of each stream, int32 [b], without padding."""
        return None if self.states is None else self.states[0].position

    @property
    def batch_size(self) -> int:
        """Number of streams; -1 before the first token."""
        return -1 if self.states is None else self.states[0].position.shape[0]

    @property
    def is_initialized(self) -> bool:
        """True after the first token."""
        return self.states is not None

    @property
    def is_compileable(self) -> bool:
        """False: `generate` must not compile a step, because the state changes its shape."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False; see `crop`."""
        return False

    # Per block: neither a sliding window nor a linear attention of transformers.
    @property
    def is_sliding(self) -> list[bool]:
        """False for each block."""
        return [False] * max(len(self), 1)

    @property
    def is_linear(self) -> list[bool]:
        """False for each block."""
        return [False] * max(len(self), 1)
