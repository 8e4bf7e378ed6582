"""`mc variants`, `mc segments` and `mc configs`: options, segments, shipped configurations."""

from collections.abc import Mapping
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mc_core import segment_lengths
from mc_core.aggregations import AGGREGATIONS
from mc_core.config import GATES, MIXERS, PRESETS, SEGMENTATIONS
from mc_core.errors import UserError
from mc_core.memories import MEMORIES
from train.cli.options import Segmentation
from train.shipped_configs import describe, shipped_names

WIDTH = 160  # of the table of configurations, if stdout is not a terminal


def variants() -> None:
    """List memories, aggregations, segmentations, gates and mixers with a description."""
    print_variants(Console())


def segments(
    length: Annotated[int, typer.Option(help="number of tokens")],
    segmentation: Segmentation = Segmentation("constant"),
    segment_size: Annotated[
        int, typer.Option(help="tokens of a segment; unused by logarithmic")
    ] = 256,
) -> None:
    """Print the segment lengths of a sequence; for fenwick, those that the last token reads."""
    try:
        lengths = segment_lengths(length, segmentation, segment_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(*lengths, sep=", ")


def configs() -> None:
    """List the shipped configurations, which every CONFIG argument takes by name."""
    table = Table("name", "command", "task", "description")
    for shipped in map(describe, shipped_names()):
        table.add_row(shipped.name, f"mc {shipped.command}", shipped.task, shipped.description)
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def print_variants(console: Console) -> None:
    """Print every option of these kinds with its description."""
    sections: dict[str, Mapping[str, str]] = {
        "model.layer.memory.kind": {name: memory.description for name, memory in MEMORIES.items()},
        "model.layer.aggregation": {name: rule.description for name, rule in AGGREGATIONS.items()},
        "model.layer.segmentation": SEGMENTATIONS,
        "model.layer.gate": GATES,
        "model.mixers": {name: mixer.description for name, mixer in MIXERS.items()},
        "MCConfig constructor": PRESETS,
    }
    for title, descriptions in sections.items():
        table = Table(title, "description")
        for name, description in descriptions.items():
            table.add_row(name, description)
        console.print(table)
    console.print(
        f"{len(MEMORIES) * len(AGGREGATIONS)} variants: every kind with every aggregation"
    )
