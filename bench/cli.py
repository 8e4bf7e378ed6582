"""`mc bench`: speed and memory, measured. Each command imports what it runs."""

import json as plain
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mc_core.config import AGGREGATIONS, MEMORIES
from mc_core.errors import UserError
from mc_core.files import write_atomic

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)

Kind = StrEnum("Kind", list(MEMORIES))  # type: ignore[misc]
Aggregation = StrEnum("Aggregation", list(AGGREGATIONS))  # type: ignore[misc]
CacheDtype = StrEnum("CacheDtype", ["float32", "bfloat16"])

JsonFile = Annotated[Path | None, typer.Option(help="write the numbers to this file, too")]
MarkdownFile = Annotated[Path | None, typer.Option(help="write the table to this file, too")]


@app.command()
def memory(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a run's YAML file")],
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="length of the stream; may be repeated")
    ] = None,
    cache_dtype: Annotated[
        CacheDtype, typer.Option(help="of cached memories, keys and values")
    ] = CacheDtype.float32,
    json: JsonFile = None,
) -> None:
    """Print the bytes of a model's cache beside those of a KV cache; nothing is run."""
    from bench.memory import TOKENS, measure, print_memory
    from train.config import load_config

    model = load_config(config).model
    try:
        result = measure(model, tokens or TOKENS, str(cache_dtype))
    except ValueError as error:
        raise UserError(f"{config}: {error}") from error
    print_memory(Console(), model, result)
    _write(json, result)


@app.command()
def decode(
    kind: Annotated[list[Kind] | None, typer.Option(help="only these memories")] = None,
    aggregation: Annotated[
        list[Aggregation] | None, typer.Option(help="only these aggregations")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens before; may be repeated")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="of the layer")] = 256,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    segment_size: Annotated[int, typer.Option(min=1)] = 256,
    chunk_size: Annotated[int, typer.Option(min=1)] = 64,
    prefill: Annotated[int, typer.Option(min=0, help="tokens of the prompt; 0 for none")] = 2048,
    runs: Annotated[int, typer.Option(min=1, max=60, help="timed tokens of each layer")] = 20,
    seed: int = 0,
    json: JsonFile = None,
    markdown: MarkdownFile = None,
) -> None:
    """Time a token after long contexts, beside attention with a KV cache; a prompt; storage."""
    from bench import decode as measured
    from bench.machine import machine

    kinds = [str(one) for one in kind or ("linear", "titans")]
    wanted = [str(one) for one in aggregation or AGGREGATIONS if str(one) != "mean" or aggregation]
    try:
        configs = measured.layers(
            kinds,
            wanted,
            width=width,
            heads=heads,
            segment_size=segment_size,
            chunk_size=chunk_size,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    contexts = context or (1024, 8192, 65536)
    stored = [one for one in configs if one.slots(1)]
    result = {
        "machine": machine(),
        "decode": measured.compare(configs, contexts, runs, seed),
        "prefill": [measured.compare_prefill(c, prefill, seed) for c in configs if prefill],
        "storage": [
            row for c in stored if prefill for row in measured.compare_storage(c, prefill, seed)
        ],
    }
    console = Console()
    measured.print_decode(console, result)
    console.print(result["machine"], soft_wrap=True, highlight=False)
    _write(json, result)
    if markdown:
        write_atomic(markdown, measured.as_markdown(result).encode())


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        write_atomic(path, (plain.dumps(result, indent=2) + "\n").encode())
