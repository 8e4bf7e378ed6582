"""Bytes of a stream's cache, and of the KV cache of attention, from the configuration alone."""

from itertools import pairwise
from typing import NamedTuple

from mc_core.config import DLAConfig, LinearConfig, MCConfig, TitansConfig


class Footprint(NamedTuple):
    """Bytes of one layer and one stream."""

    state: int  # the online memory, and all else that does not grow
    memories: int  # cached memories
    pools: int  # their pooled keys and lengths
    read: int  # of state and memories that the next token reads

    @property
    def total(self) -> int:
        """All that the cache holds."""
        return self.state + self.memories + self.pools


def memory_size(config: MCConfig) -> int:
    """Return the number of weights of one memory, all heads together."""
    memory, h, width = config.memory, config.num_heads, config.head_dim
    if isinstance(memory, DLAConfig | TitansConfig):
        dims = [width, *[width * memory.expansion] * (memory.depth - 1), width]
        return h * sum(a * b for a, b in pairwise(dims))
    normalizer = isinstance(memory, LinearConfig) and memory.normalize
    return h * width * (width + normalizer)


def cache_footprint(config: MCConfig, tokens: int, item: int = 4) -> Footprint:
    """Return the bytes of a layer's cache with room for `tokens` tokens of one stream.

    Args:
        config: the layer's configuration, with segments of constant size.
        tokens: the stream's length, all of it past.
        item: bytes of a cached weight; the online memory's have 4.
    """
    size, h, width = memory_size(config), config.num_heads, config.head_dim
    copies = {"linear": 1, "swla": 1, "dla": 2, "titans": 3}[config.memory.kind]
    copies += config.reads_sum
    state = 4 * copies * size
    state += 4 * 2 * h * width  # the online segment's keys: their sum and their pool
    state += 4 * 2 * h * width * (config.memory.kind == "swla")  # the token before
    state += 4 * 3 * max(config.conv_width - 1, 0) * config.d_model
    state += 4 * 4  # length, slot, position, limit
    slots = config.slots(tokens)
    complete = min(slots, tokens // config.segment_size)
    reads = min(complete, config.ssc_top_k) if config.aggregation == "ssc" else complete
    return Footprint(
        state=state,
        memories=slots * size * item,
        pools=slots * 4 * (h * width + 1),
        read=state + reads * size * item,
    )


def kv_bytes(config: MCConfig, tokens: int, item: int = 4) -> int:
    """Return the bytes of the KV cache of an attention layer of the same width."""
    return 2 * config.d_model * tokens * item


def outgrows_kv(config: MCConfig) -> bool:
    """Whether a segment's cached memory is larger than the keys and values of its tokens."""
    return bool(config.slots(1)) and memory_size(config) >= 2 * config.d_model * config.segment_size
