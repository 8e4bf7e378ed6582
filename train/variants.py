"""Tables of what can be configured, in words."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from mc_core.aggregations import AGGREGATIONS
from mc_core.config import GATES, MIXERS
from mc_core.memories import MEMORIES


def print_variants(console: Console) -> None:
    """Print every memory kind, aggregation, gate and mixer with its description."""
    sections: dict[str, Mapping[str, str]] = {
        "model.layer.memory.kind": {name: memory.description for name, memory in MEMORIES.items()},
        "model.layer.aggregation": {name: rule.description for name, rule in AGGREGATIONS.items()},
        "model.layer.gate": GATES,
        "model.mixers": {name: mixer.description for name, mixer in MIXERS.items()},
    }
    for title, descriptions in sections.items():
        table = Table(title, "what it is")
        for name, description in descriptions.items():
            table.add_row(name, description)
        console.print(table)
    console.print(f"{len(MEMORIES) * len(AGGREGATIONS)} variants: each kind with each aggregation")
