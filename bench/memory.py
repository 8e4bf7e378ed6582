"""`mc bench memory`: cache size of a model compared with a KV cache, by its configuration."""

from collections.abc import Sequence

from mc_core.config import MCConfig, ModelConfig
from mc_core.footprint import cache_footprint, kv_bytes, memory_size, outgrows_kv, state_bytes
from mc_core.segmentation import check_streaming_config
from mc_core.tables import ResultTable, Row
from parity.environment import result_table

ITEMS = {"float32": 4, "bfloat16": 2}


def run(model: ModelConfig, tokens: Sequence[int], cache_dtype: str) -> ResultTable:
    """Return the cache bytes of one stream, summed over layers.

    Args:
        model: configuration of the model.
        tokens: lengths of the stream.
        cache_dtype: dtype of cached memories, keys and values.

    Raises:
        ValueError: the segments cannot stream.
    """
    layer, layers, item = model.layer, model.num_layers, ITEMS[cache_dtype]
    memories = model.block_layers.count(layer)
    if memories:
        check_streaming_config(layer)
    rows: list[Row] = []
    for length in tokens:
        one, kv = cache_footprint(layer, length, item), layers * kv_bytes(layer, length, item)
        cache = state_bytes(model, length, item)
        rows.append(
            {
                "tokens": length,
                "state MiB": memories * one.state / 2**20,
                "cached memories MiB": memories * (one.memories + one.pools) / 2**20,
                "cache MiB": cache / 2**20,
                "KV MiB": kv / 2**20,
                "cache / KV": cache / kv,
            }
        )
    about = (
        f"{layers} layers of {model.name}, {layer.num_heads} heads of {layer.head_dim}, "
        f"{layer.segmentation} segments of {layer.segment_size}; cached memories, keys and values "
        f"{cache_dtype}, the online memory float32"
    )
    return result_table(
        "Cache of one stream", rows, (about, *(warnings(layer) if memories else ()))
    )


def warnings(layer: MCConfig) -> list[str]:
    """Return warnings if cached memories are larger than the keys and values of their segments."""
    if not outgrows_kv(layer):
        return []
    enough = memory_size(layer) // (2 * layer.d_model) + 1
    return [
        f"warning: a cached {layer.memory.kind} memory is larger than the keys and values of its "
        f"segment at segment_size = {layer.segment_size}: this cache outgrows a KV cache at any "
        f"length; it is smaller from segment_size = {enough}"
    ]
