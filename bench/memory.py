"""`mc bench memory`: a model's cache beside a Transformer's KV cache, from its config."""

from collections.abc import Sequence
from math import ceil

from bench.report import Report, Row
from mc_core.config import MCConfig, ModelConfig

STATE = 4  # bytes of a number: memories and pools are float32 in either compute type
NUMBER = {"float32": 4, "bfloat16": 2}


def memory_numbers(config: MCConfig) -> int:
    """Return how many numbers one memory of all heads holds."""
    k, memory = config.head_dim, config.memory
    depth = getattr(memory, "depth", 1)
    f = k * getattr(memory, "expansion", 1)
    dims = [k, *[f] * (depth - 1), k]
    outputs = dims[1:]
    if getattr(memory, "normalize", False):
        outputs = [k + 1]  # the normaliser is one more row
    return config.num_heads * sum(into * out for into, out in zip(dims[:-1], outputs, strict=True))


def caches_memories(config: MCConfig) -> bool:
    """Whether every segment's memory is kept; else a running sum, or nothing, stands for them."""
    if config.aggregation == "none":
        return False
    plain = config.memory.kind in ("linear", "swla") and not getattr(
        config.memory, "normalize", False
    )
    return config.gated or not plain


def cache_numbers(config: MCConfig, tokens: int) -> int:
    """Return how many numbers a layer keeps of one sequence of so many tokens."""
    kind, one = config.memory.kind, memory_numbers(config)
    copies = {"linear": 1, "swla": 1, "dla": 2, "titans": 3}  # weights, anchor, momentum
    online = copies[kind] * one + config.d_model  # and the sum of the segment's keys
    if kind == "swla":
        online += 2 * config.d_model
    if caches_memories(config):
        return online + ceil(tokens / config.segment_size) * (one + config.d_model)
    return online + (one if config.aggregation in ("residual", "mean") else 0)


def run(model: ModelConfig, dtype: str, lengths: Sequence[int]) -> Report:
    """Return the bytes of one sequence's cache, all layers, beside keys and values of attention.

    Args:
        model: the model.
        dtype: compute type, in which a KV cache would be kept.
        lengths: numbers of tokens.
    """
    layer, layers = model.layer, model.num_layers
    rows: list[Row] = []
    for tokens in lengths:
        ours = layers * cache_numbers(layer, tokens) * STATE
        theirs = layers * 2 * layer.d_model * tokens * NUMBER[dtype]
        rows.append(
            {
                "tokens": tokens,
                "cache MiB": ours / 2**20,
                "KV MiB": theirs / 2**20,
                "cache / KV": ours / theirs,
            }
        )
    notes = [
        f"{layer.memory.kind} + {layer.aggregation}, {layers} layers, width {layer.d_model}, "
        f"{layer.num_heads} heads; memories are float32, keys and values {dtype}"
    ]
    if caches_memories(layer):
        numbers = memory_numbers(layer) + layer.d_model
        enough = numbers * STATE / (2 * layer.d_model * NUMBER[dtype])
        if layer.segment_size < enough:
            notes.append(
                f"warning: this cache outgrows a KV cache at any length; it is the smaller one for "
                f"segments of more than {enough:,.0f} tokens (segment_size = {layer.segment_size})"
            )
    return Report("Cache of one sequence", rows, notes)
