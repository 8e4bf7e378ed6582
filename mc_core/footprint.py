"""Parameters, bytes of a stream's state and FLOPs a token, from the configuration alone.

A layer is a memory or attention; a model adds up its blocks. One multiplication and one addition
are two FLOPs; only products are counted, not norms, activations, softmax and gates' sums.
"""

from itertools import pairwise
from typing import NamedTuple

from mc_core.config import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    MCConfig,
    ModelConfig,
    TitansConfig,
)
from mc_core.segmentation import segment_lengths

Layer = MCConfig | AttentionConfig


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
    h, width = config.num_heads, config.head_dim
    normalizer = isinstance(config.memory, LinearConfig) and config.memory.normalize
    return h * (sum(a * b for a, b in pairwise(_widths(config))) + normalizer * width)


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


def state_bytes(config: Layer | ModelConfig, tokens: int, item: int = 4) -> int:
    """Return the bytes of the cache of one stream with room for `tokens` tokens.

    It is the sum of the arrays of `init_cache(1, tokens)`: for attention `2 d item + 1` a slot, a
    slot a token or, under a window, a token of the window.

    Args:
        config: of a layer or model, with segments of constant size.
        tokens: the stream's length.
        item: bytes of a cached weight, key or value; all else has 4.
    """
    if isinstance(config, ModelConfig):
        return sum(state_bytes(layer, tokens, item) for layer in config.block_layers)
    if isinstance(config, MCConfig):
        return cache_footprint(config, tokens, item).total
    tails = 4 * 3 * max(config.conv_width - 1, 0) * config.d_model
    slot = 2 * config.d_model * item + 1  # and whether a real token is in it
    return config.slots(tokens) * slot + tails + 4 * 2  # position, limit


def layer_parameters(config: Layer) -> int:
    """Return the number of parameters of a memory layer or an attention layer."""
    d, h = config.d_model, config.num_heads
    count = 4 * d * d + 3 * config.conv_width * d + d * (config.output_norm == "rms")
    if isinstance(config, AttentionConfig):
        return count
    memory = config.memory
    count += d * d * config.projects_u
    count += {"constant": 0, "head": h, "token": h + d * h}[memory.coefficients] * len(
        memory.ranges
    )
    if isinstance(memory, DLAConfig | TitansConfig) or memory.learn_initial:
        count += h * sum(a * b for a, b in pairwise(_widths(config)))
    return count + 2 * d * (getattr(memory, "norm", "none") == "layer")


def model_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a language model."""
    d, f = config.layer.d_model, config.ffn_dim
    block = d + (d + 3 * d * f) * (f > 0)  # norms and feed-forward
    layers = sum(layer_parameters(layer) for layer in config.block_layers)
    table = config.vocab_size * d
    return layers + config.num_layers * block + table * (2 - config.tie_embeddings) + d


def flops_per_token(config: Layer | ModelConfig, tokens: int) -> float:
    """Return the FLOPs of the forward pass, a token, mean over a sequence of so many tokens.

    With P the weights of all heads' memory (of an MLP's first and last layer P_1 and P_L), C the
    tokens of a chunk, w those of the convolution, f the width of the feed-forward, and n the cached
    memories that a token reads, in the mean over the tokens (0, 1, 2... for one segment after the
    other; under `ssc` at most `top_k`):

    - projections `8 d²`, and `2 d²` for u; convolution `6 w d`; learned coefficients `2 d h` each;
    - softmax attention: `4 d` for every token seen, itself included;
    - matrix memory: write and read `4 P`, in the chunk `4 d C`: a chunk's products are taken whole,
      though only half is used;
    - MLP memory: inner forward pass `2 P` (`2 (P - P_L)` under the dot loss without a norm, whose
      gradient needs no output), inner backward pass `2 (P - P_1)`, write and read `4 P`, in the
      chunk `2 C` times the widths that its layers read and write; momentum writes and reads another
      `4 P`;
    - cached memories `2 P n`: one for all where their sum is read; gates `2 d (n + 1)`, under `ssc`
      for all cached ones;
    - a model's feed-forward `6 d f` a block, its head `2 d` times the vocabulary.

    Args:
        config: of a layer or model.
        tokens: the sequence's length.
    """
    d = config.layer.d_model if isinstance(config, ModelConfig) else config.d_model
    if isinstance(config, ModelConfig):
        layers = sum(flops_per_token(layer, tokens) for layer in config.block_layers)
        return layers + config.num_layers * 6 * d * config.ffn_dim + 2 * d * config.vocab_size
    flops: float = 8 * d * d + 6 * config.conv_width * d
    if isinstance(config, AttentionConfig):
        window = config.slots(tokens)
        seen = window - window * (window - 1) / 2 / tokens  # mean of min(i, window), i = 1...
        return flops + 4 * d * seen
    learned = len(config.memory.ranges) * (config.memory.coefficients == "token")
    flops += 2 * d * d * config.projects_u + 2 * d * config.num_heads * learned
    return flops + _write_and_read(config, tokens) + _cached_reads(config, tokens)


def kv_bytes(config: MCConfig, tokens: int, item: int = 4) -> int:
    """Return the bytes of the KV cache of an attention layer of the same width."""
    return 2 * config.d_model * tokens * item


def outgrows_kv(config: MCConfig) -> bool:
    """Whether a segment's cached memory is larger than the keys and values of its tokens."""
    return bool(config.slots(1)) and memory_size(config) >= 2 * config.d_model * config.segment_size


def _widths(config: MCConfig) -> list[int]:
    """Return what a head's memory reads, its hidden widths, and what it gives."""
    memory, width = config.memory, config.head_dim
    hidden = 0
    if isinstance(memory, DLAConfig | TitansConfig):
        hidden = memory.depth - 1
    return [width, *[width * getattr(memory, "expansion", 1)] * hidden, width]


def _write_and_read(config: MCConfig, tokens: int) -> float:
    memory, h, widths = config.memory, config.num_heads, _widths(config)
    longest = max(segment_lengths(tokens, config.segmentation, config.segment_size))
    chunk = min(config.chunk_size, longest)
    layers = [h * a * b for a, b in pairwise(widths)]
    size = memory_size(config)
    within = 2 * chunk * h * sum(a + b for a, b in pairwise(widths))
    flops = 4 * size + within
    if isinstance(memory, DLAConfig | TitansConfig):
        needs_output = memory.objective == "l2" or memory.norm == "layer"
        flops += 2 * (size - (0 if needs_output else layers[-1])) + 2 * (size - layers[0])
        flops += 4 * size * (memory.kind == "titans")
    return flops


def _cached_reads(config: MCConfig, tokens: int) -> float:
    """Return what reading cached memories, and scoring them, takes a token."""
    if config.aggregation == "none":
        return 0.0
    lengths = segment_lengths(tokens, config.segmentation, config.segment_size)

    def mean(most: float) -> float:
        return sum(min(i, most) * length for i, length in enumerate(lengths)) / tokens

    cached = mean(len(lengths))
    most = {"ssc": config.ssc_top_k}.get(config.aggregation, len(lengths))
    reads = mean(1 if config.reads_sum else most)
    scores = 2 * config.d_model * (cached + 1) * (config.gated and config.gate == "context")
    return 2 * memory_size(config) * reads + scores
