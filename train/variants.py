"""What can be configured, in words."""

from rich.console import Console
from rich.table import Table

from mc_core.config import AGGREGATIONS, MEMORIES

MEMORY_WORDS = {
    "linear": "matrix, dot loss: linear attention",
    "swla": "matrix, dot loss over the last two tokens: sliding-window linear attention",
    "dla": "MLP, gradient steps on the dot loss: deep linear attention",
    "titans": "MLP, gradient steps with momentum on the L2 loss: Titans",
}
AGGREGATION_WORDS = {
    "none": "the online memory alone: no caching",
    "residual": "sum of the reads of the online memory and every cached one",
    "grm": "gated residual memory: the reads weighted by a softmax over all memories",
    "soup": "memory soup: one read of the memories' gate-weighted mixture",
    "ssc": "sparse selective caching: grm over the online memory and the top-k cached ones",
    "mean": "plain average of all reads: caching added after training",
}


def print_variants(console: Console) -> None:
    """Print every memory kind and every aggregation; each kind goes with each aggregation."""
    for title, names, words in (
        ("model.layer.memory.kind", MEMORIES, MEMORY_WORDS),
        ("model.layer.aggregation", AGGREGATIONS, AGGREGATION_WORDS),
    ):
        table = Table(title, "what it is")
        for name in names:
            table.add_row(name, words[name])
        console.print(table)
    console.print(f"{len(MEMORIES) * len(AGGREGATIONS)} variants: each kind with each aggregation")
