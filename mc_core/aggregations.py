"""Aggregations: combinations of online and cached memories in a read (section 5)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Aggregation:
    """Properties of an aggregation.

    Attributes:
        description: one line for help texts.
        reads_cache: cached memories are read.
        gated: reads are weighted by a softmax over scores of the connector u.
        averaged: ungated reads are averaged instead of summed.
        sparse: only the `ssc_top_k` cached memories with the highest scores are read.
        mixes_weights: the memories' weights are mixed, and the mixture is read once.
    """

    description: str
    reads_cache: bool = True
    gated: bool = False
    averaged: bool = False
    sparse: bool = False
    mixes_weights: bool = False


AGGREGATIONS: dict[str, Aggregation] = {
    "none": Aggregation("the online memory alone: no caching", reads_cache=False),
    "residual": Aggregation("sum of the reads of the online memory and every cached one"),
    "grm": Aggregation(
        "gated residual memory: the reads weighted by a softmax over all memories", gated=True
    ),
    "soup": Aggregation(
        "memory soup: one read of the memories' gate-weighted mixture",
        gated=True,
        mixes_weights=True,
    ),
    "ssc": Aggregation(
        "sparse selective caching: grm over the online memory and the top-k cached ones",
        gated=True,
        sparse=True,
    ),
    "mean": Aggregation("plain average of all reads: caching added after training", averaged=True),
}
