"""What can be configured, in words."""

from rich.console import Console
from rich.table import Table

from mc_core.config import AGGREGATIONS, GATES, MEMORIES, MIXERS

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
GATE_WORDS = {
    "context": "grm, soup, ssc: a memory's score is the connector u times its pooled key",
    "token": "the same by the token alone: the component of u for the memory's level, by its age",
}
MIXER_WORDS = {
    "memory": "model.layer: a memory and its cached states",
    "attention": "causal softmax attention with rotary positions, its heads those of model.layer",
    "window": "the same over the last model.attention_window tokens",
}


def print_variants(console: Console) -> None:
    """Print every memory kind, every aggregation, and what else a block may mix tokens with."""
    for title, names, words in (
        ("model.layer.memory.kind", MEMORIES, MEMORY_WORDS),
        ("model.layer.aggregation", AGGREGATIONS, AGGREGATION_WORDS),
        ("model.layer.gate", GATES, GATE_WORDS),
        ("model.mixers", MIXERS, MIXER_WORDS),
    ):
        table = Table(title, "what it is")
        for name in names:
            table.add_row(name, words[name])
        console.print(table)
    console.print(f"{len(MEMORIES) * len(AGGREGATIONS)} variants: each kind with each aggregation")
