"""Number of parameters, state bytes and FLOPs per token of a configuration.

A layer is a memory layer, or one of softmax or log-linear attention. A model is counted as the sum
of its blocks. A multiply-add is two FLOPs. Only matrix products are counted, not norms, activations
and softmax.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from mc_core.attention import AttentionConfig
from mc_core.config import LayerConfig, MCConfig, ModelConfig
from mc_core.log_linear import LogLinearConfig, mean_reads
from mc_core.segmentation import segment_lengths


class Footprint(NamedTuple):
    """Bytes of a layer's cache for one stream."""

    state: int  # online memory and all other buffers of constant size
    memories: int  # cached memories
    pools: int  # pooled keys and lengths of the cached memories
    read: int  # bytes of state and memories that the next token reads

    @property
    def total(self) -> int:
        """Total size of the cache."""
        return self.state + self.memories + self.pools


def memory_size(config: MCConfig) -> int:
    """Return the number of weights of one memory, summed over heads."""
    memory, width = config.memory, config.head_dim
    weights = memory.state_size(width, width) + memory.normalizer_rows * width
    return config.num_heads * weights


def cache_footprint(config: MCConfig, tokens: int, item: int = 4) -> Footprint:
    """Return the bytes of a layer's cache for one stream of `tokens` tokens.

    Args:
        config: the layer's configuration, with `constant` or `fenwick` segments.
        tokens: length of the stream.
        item: bytes per cached weight; the online memory has 4 bytes per weight.
    """
    size, h, width = memory_size(config), config.num_heads, config.head_dim
    copies = config.memory.state_copies + config.reads_sum
    state = 4 * copies * size
    state += 4 * 2 * h * width  # sum of the online segment's keys, and its pooled key
    state += 4 * 2 * h * width * config.memory.uses_previous_token
    state += 4 * 3 * max(config.conv_width - 1, 0) * config.d_model
    state += 4 * 4  # length, slot, position, capacity
    state += 4 * h * config.sums_states  # retention of the online segment
    state += 4 * h * config.memory.updates_at_chunk_end  # retention since the chunk's start
    slots = config.slots(tokens)
    cached = min(slots, _cached_count(config, tokens // config.segment_size))
    reads = min(cached, config.ssc_top_k) if config.rule.sparse else cached
    # With buckets, also the sums of their keys, and their retention if states are summed.
    pool = h * width * (1 + config.has_buckets) + h * config.sums_states
    return Footprint(
        state=state,
        memories=slots * size * item,
        pools=slots * 4 * (pool + 1),
        read=state + reads * size * item,
    )


def state_bytes(config: LayerConfig | ModelConfig, tokens: int, item: int = 4) -> int:
    """Return the bytes of the cache of one stream of `tokens` tokens.

    This is the total size of the arrays of `init_cache(1, tokens)`. Attention stores `2 d item + 1`
    bytes per slot, with d the width of all key heads, and has one slot per token, or per token of
    the window. Log-linear attention stores a float32 state per level.

    Args:
        config: configuration of a layer or model, with `constant` or `fenwick` segments.
        tokens: length of the stream.
        item: bytes per cached weight, key or value; all other arrays have 4 bytes per element.
    """
    if isinstance(config, ModelConfig):
        return sum(state_bytes(layer, tokens, item) for layer in config.block_layers)
    return _COSTS[type(config)].state_bytes(config, tokens, item)


def layer_parameters(config: LayerConfig) -> int:
    """Return the number of parameters of a layer."""
    d, kv = config.d_model, config.kv_heads * config.head_dim
    projections, convolutions = 2 * d * (d + kv), config.conv_width * (d + 2 * kv)
    shared = projections + convolutions + d * (config.output_norm == "rms")
    return shared + _COSTS[type(config)].parameters(config)


def model_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a language model."""
    d, f = config.layer.d_model, config.ffn_dim
    block = d + (d + 3 * d * f) * (f > 0)  # norms and feed-forward
    layers = sum(layer_parameters(layer) for layer in config.block_layers)
    table = config.vocab_size * d
    return layers + config.num_layers * block + table * (2 - config.tie_embeddings) + d


def flops_per_token(config: LayerConfig | ModelConfig, tokens: int) -> float:
    """Return the FLOPs of the forward pass per token, averaged over a sequence of `tokens` tokens.

    P is the number of memory weights of all heads (P_1 and P_L: first and last layer of an MLP), C
    the chunk size, w the width of the convolution, f the width of the feed-forward, and n the
    average number of cached memories that a token reads (0 in the first segment, 1 in the second,
    and so on; under `fenwick`, the set bits of this number; at most `top_k` under `ssc`):

    - projections `8 d²`, and `2 d²` for u; convolution `6 w d`; learned coefficients `2 d h` each;
      keys and values with fewer heads cost less in proportion;
    - softmax attention: `4 d` per visible token, itself included;
    - log-linear attention: level weights `2 d h` per level; within the chunk `4 d C`; if there are
      several chunks, write `2 P`, and read `2 P` per state of earlier chunks;
    - matrix memory: write and read `4 P`, within the chunk `4 d C` (products include the half that
      the causal mask discards);
    - MLP memory: inner forward pass `2 P` (`2 (P - P_L)` under the dot loss without a norm, whose
      gradient needs no output), inner backward pass `2 (P - P_1)`, write and read `4 P`,
      within the chunk `2 C` times the input and output widths of its layers; momentum another
      `4 P`; orthogonal updates of a layer of widths a <= b: `5 (4 a² b + 2 a³)` per chunk and head;
    - layers that are not written: `2` times their weights for each query and key;
    - delta rule: similarities, inverse and maps of the errors, within the chunk;
    - cached memories `2 P n` (n = 1 if reads use their sum); gates `2 d (n + 1)`, with scores of
      all cached memories also under `ssc`;
    - feed-forward `6 d f` per block; output head `2 d` times the vocabulary.

    Args:
        config: configuration of a layer or model.
        tokens: length of the sequence.
    """
    d = config.layer.d_model if isinstance(config, ModelConfig) else config.d_model
    if isinstance(config, ModelConfig):
        layers = sum(flops_per_token(layer, tokens) for layer in config.block_layers)
        return layers + config.num_layers * 6 * d * config.ffn_dim + 2 * d * config.vocab_size
    kv = config.kv_heads * config.head_dim
    shared = 4 * d * (d + kv) + 2 * config.conv_width * (d + 2 * kv)
    return shared + _COSTS[type(config)].flops(config, tokens)


def kv_bytes(config: MCConfig, tokens: int, item: int = 4) -> int:
    """Return the bytes of the KV cache of an attention layer of the same width."""
    return 2 * config.d_model * tokens * item


def outgrows_kv(config: MCConfig) -> bool:
    """Return True if a cached memory is larger than the keys and values of its segment.

    False for buckets, which have a memory per power of two, not per segment.
    """
    if config.has_buckets or not config.slots(1):
        return False
    return memory_size(config) >= 2 * config.d_model * config.segment_size


def _memory_state(config: MCConfig, tokens: int, item: int) -> int:
    return cache_footprint(config, tokens, item).total


def _memory_parameters(config: MCConfig) -> int:
    d, h, memory, width = config.d_model, config.num_heads, config.memory, config.head_dim
    learned = {"constant": 0, "head": h, "token": h + d * h}[memory.coefficient_mode]
    initial = h * sum(memory.sizes(width, width)) * memory.learns_initial
    gates = d * d * config.projects_u + h * (config.has_gate_bias + config.learns_temperature)
    return gates + learned * len(memory.ranges) + initial + 2 * d * memory.has_layer_norm


def _memory_flops(config: MCConfig, tokens: int) -> float:
    d, memory = config.d_model, config.memory
    learned = len(memory.ranges) * (memory.coefficient_mode == "token")
    coefficients = 2 * d * d * config.projects_u + 2 * d * config.num_heads * learned
    return coefficients + _write_and_read(config, tokens) + _cached_reads(config, tokens)


def _write_and_read(config: MCConfig, tokens: int) -> float:
    memory, h, width = config.memory, config.num_heads, config.head_dim
    chunk = min(config.chunk_size, max(_segment_lengths(config, tokens)))
    layers = list(pairwise(memory.widths(width, width)))[memory.fixed_layers :]
    size = memory_size(config)
    within = 2 * chunk * h * sum(a + b for a, b in layers)
    flops: float = 4 * size + within + h * memory.gradient_flops(width, width)
    flops += 4 * h * sum(memory.sizes(width, width)[: memory.fixed_layers])
    flops += h * memory.chunk_end_flops(width, width) / chunk
    if memory.delta_rule:
        flops += h * _delta_rule_flops(config, chunk)
    return flops + 4 * size * memory.has_momentum + 2 * size * memory.decays_to_initial


def _delta_rule_flops(config: MCConfig, chunk: int) -> int:
    """Return the FLOPs per token and head of the exact errors of a chunk."""
    memory, width = config.memory, config.head_dim
    a, b = list(pairwise(memory.widths(width, width)))[-1]
    maps = 1 + memory.has_momentum
    inverse = 2 * sum((chunk >> i) ** 2 for i in range(1, chunk.bit_length())) // chunk
    target = 2 * a * b * memory.decays_to_initial
    return 2 * chunk * a + 2 * chunk * (b + maps * a) + 2 * maps * a * b + 2 * inverse + target


def _cached_reads(config: MCConfig, tokens: int) -> float:
    """Return the FLOPs per token of reading and scoring cached memories."""
    if not config.rule.reads_cache:
        return 0.0
    lengths = _segment_lengths(config, tokens)

    def mean_count(limit: float) -> float:
        counts = (min(_cached_count(config, i), limit) for i in range(len(lengths)))
        return sum(i * length for i, length in zip(counts, lengths, strict=True)) / tokens

    cached = mean_count(len(lengths))
    limit = config.ssc_top_k if config.rule.sparse else len(lengths)
    reads = mean_count(1 if config.reads_sum else limit)
    scores = 2 * config.d_model * (cached + 1) * (config.gated and config.gate == "context")
    return 2 * memory_size(config) * reads + scores


def _segment_lengths(config: MCConfig, tokens: int) -> tuple[int, ...]:
    """Return the lengths of the segments that are written, also those inside of buckets."""
    segmentation = "constant" if config.has_buckets else config.segmentation
    return segment_lengths(tokens, segmentation, config.segment_size)


def _cached_count(config: MCConfig, complete: int) -> int:
    """Return the number of cached memories after a number of complete segments."""
    return complete.bit_count() if config.has_buckets else complete


def _attention_state(config: AttentionConfig, tokens: int, item: int) -> int:
    width = config.kv_heads * config.head_dim
    tails = 4 * max(config.conv_width - 1, 0) * (config.d_model + 2 * width)
    slot = 2 * width * item + 1  # key, value and mask
    return config.slots(tokens) * slot + tails + 4 * 2  # position, capacity


def _attention_flops(config: AttentionConfig, tokens: int) -> float:
    window = config.slots(tokens)
    seen = window - window * (window - 1) / 2 / tokens  # mean of min(i, window), i = 1...
    return 4 * config.d_model * seen


def _log_linear_state(config: LogLinearConfig, tokens: int, item: int) -> int:
    tails = 3 * max(config.conv_width - 1, 0) * config.d_model
    states = config.slots(tokens) * config.d_model * config.head_dim
    return 4 * (states + tails + 2)  # position, capacity


def _log_linear_parameters(config: LogLinearConfig) -> int:
    d, h = config.d_model, config.num_heads
    learned = {"constant": 0, "head": h, "token": h + d * h}[config.retention]
    return (d + 1) * h * config.num_levels + learned


def _log_linear_flops(config: LogLinearConfig, tokens: int) -> float:
    d, h, size = config.d_model, config.num_heads, config.d_model * config.head_dim
    coefficients = 2 * d * h * (config.num_levels + (config.retention == "token"))
    chunk = min(config.chunk_size, 1 << (tokens - 1).bit_length())
    chunks = -(-tokens // chunk)
    return coefficients + 4 * d * chunk + 2 * size * ((chunks > 1) + mean_reads(chunks))


class _LayerCosts(NamedTuple):
    """Cost functions of a kind of layer, excluding projections, convolutions and output norm."""

    state_bytes: Callable[[Any, int, int], int]  # (config, tokens, bytes of an item)
    parameters: Callable[[Any], int]  # (config)
    flops: Callable[[Any, int], float]  # (config, tokens), per token


_COSTS: dict[type, _LayerCosts] = {
    MCConfig: _LayerCosts(_memory_state, _memory_parameters, _memory_flops),
    AttentionConfig: _LayerCosts(_attention_state, lambda config: 0, _attention_flops),
    LogLinearConfig: _LayerCosts(_log_linear_state, _log_linear_parameters, _log_linear_flops),
}
