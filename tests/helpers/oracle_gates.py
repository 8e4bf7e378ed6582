"""The oracle's pooled keys and gates (sections 4 and 5): one head, one token."""

import math
from collections.abc import Sequence

import numpy as np

from mc_core import MCConfig
from mc_core.config import NORM_EPS

Array = np.ndarray


def pooled(keys: Sequence[Array], width: int, config: MCConfig) -> Array:
    """Return the mean or the sum [k] of a segment's unmasked keys; 0 if there are none.

    With `pool_norm="l2"` it is divided by its L2 norm.
    """
    pool = np.zeros(width)
    for key in keys:
        pool = pool + key
    if config.pooling == "mean" and keys:
        pool = pool / len(keys)
    if config.pool_norm == "l2":
        pool = pool / math.sqrt(pool @ pool + NORM_EPS)
    return pool


def level_of(memory: int, segment: int) -> int:
    """Return a memory's level of log-linear attention for a token of `segment` (arXiv:2506.04761).

    Level 0 is the online segment, 1 the one before, 2 the two before that, 3 the next four.
    """
    level, reach = 0, 0
    while segment - memory > reach:
        reach += 2**level
        level += 1
    return level


def gates_of(
    u: Array | None,
    pools: Sequence[Array],
    config: MCConfig,
    bias: float = 0.0,
    temperature: float = 1.0,
    levels: Sequence[int] | None = None,
) -> Array:
    """Return the weights [s + 1] with which a token of segment s reads its memories.

    `pools` are the pooled keys [k] of the s cached segments, then the running one of the online
    segment; u is [k], or None where the aggregation has no scores. `bias` is added to the online
    memory's score. `levels` are those of the memories, 0 for the online one; None = by age.
    """
    cached = len(pools) - 1
    if config.aggregation == "none":
        return np.array([0.0] * cached + [1.0])
    if config.aggregation == "residual":  # equation 7
        return np.ones(cached + 1)
    if config.aggregation == "mean":
        return np.full(cached + 1, 1.0 / (cached + 1))
    scores = np.array([u @ pool for pool in pools])  # equation 10
    if config.gate == "token":
        levels = levels or [level_of(i, cached) for i in range(cached + 1)]
        scores = np.array([u[min(level, len(u) - 1)] for level in levels])
    chosen = list(range(cached))
    if config.aggregation == "ssc":  # equation 16; the sort is stable: ties to the earlier segment
        chosen = sorted(chosen, key=lambda i: -scores[i])[: config.ssc_top_k]
    chosen.append(cached)
    scores[cached] += bias
    logits = scores[chosen] / temperature
    gates = np.zeros(cached + 1)
    gates[chosen] = np.exp(logits - logits.max())
    return gates / gates.sum()
