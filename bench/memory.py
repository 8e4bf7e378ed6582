"""`mc bench memory`: bytes of a model's cache beside those of a KV cache, from the config alone."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mc_core.config import ModelConfig
from mc_core.footprint import cache_footprint, kv_bytes, memory_size, outgrows_kv
from mc_core.segmentation import check_streams

TOKENS = (1_024, 4_096, 16_384, 65_536, 262_144)
ITEMS = {"float32": 4, "bfloat16": 2}


def measure(model: ModelConfig, tokens: Sequence[int], cache_dtype: str) -> dict[str, Any]:
    """Return the bytes of one stream, all layers together, as plain values.

    Args:
        model: the model's configuration.
        tokens: lengths of the stream.
        cache_dtype: of cached memories, keys and values.

    Raises:
        ValueError: the segments cannot stream.
    """
    layer, item = model.layer, ITEMS[cache_dtype]
    check_streams(layer)
    rows = []
    for length in tokens:
        one = cache_footprint(layer, length, item)
        kv = kv_bytes(layer, length, item)
        rows.append(
            {
                "tokens": length,
                "state_bytes": model.num_layers * one.state,
                "cached_bytes": model.num_layers * (one.memories + one.pools),
                "cache_bytes": model.num_layers * one.total,
                "kv_bytes": model.num_layers * kv,
                "ratio": one.total / kv,
            }
        )
    return {"config": model.to_dict(), "cache_dtype": cache_dtype, "rows": rows}


def warnings(model: ModelConfig) -> list[str]:
    """Say where cached memories are larger than the keys and values of their tokens."""
    layer = model.layer
    if not outgrows_kv(layer):
        return []
    enough = memory_size(layer) // (2 * layer.d_model) + 1
    return [
        f"warning: a cached {layer.memory.kind} memory is larger than the keys and values of its "
        f"segment at segment_size = {layer.segment_size}: this cache outgrows a KV cache; it is "
        f"the smaller one from segment_size = {enough} on"
    ]


def print_memory(console: Console, model: ModelConfig, result: dict[str, Any]) -> None:
    """Print the table, and the warning where there is one."""
    layer = model.layer
    console.print(
        f"{model.num_layers} x {layer.memory.kind} + {layer.aggregation}, {layer.num_heads} heads "
        f"of {layer.head_dim}, segment_size {layer.segment_size}; one stream, "
        f"{result['cache_dtype']}; KV: attention of the same width",
        soft_wrap=True,
        highlight=False,
    )
    table = Table("tokens", "state", "cached memories", "cache", "KV cache", "cache / KV")
    for column in table.columns:
        column.justify = "right"
    for row in result["rows"]:
        sizes = [
            readable_bytes(row[f"{name}_bytes"]) for name in ("state", "cached", "cache", "kv")
        ]
        table.add_row(f"{row['tokens']:,}", *sizes, f"{row['ratio']:.2f}")
    console.print(table)
    for line in warnings(model):
        console.print(line, soft_wrap=True, highlight=False)


def readable_bytes(count: float) -> str:
    """Write a number of bytes with three digits and a unit."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while count >= 1000 and unit != "TiB":
        count, unit = count / 1024, next(units)
    return f"{count:.3g} {unit}"
