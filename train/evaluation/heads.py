"""Recall and dead heads of a model's memories."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from rich.console import Console

from mc_core.config import MCConfig
from mc_core.tables import ResultTable, Row
from mc_jax import LanguageModel
from mc_jax.inspection import Trace
from train.config import TrainConfig

LOW_RECALL = 0.01  # a memory with less has stored almost nothing
TITLE = "recall of cached memories"
NOTE = (
    "recall: share of a segment's inner loss that its writes removed; the last segment is omitted"
)
UNDEFINED = "–: there is no other segment, or the mean is not finite"


@dataclass(frozen=True)
class HeadReport:
    """Recall and dead heads, by block and head; plain values, saved as JSON.

    Attributes:
        blocks: indices of the blocks that have a memory.
        recall: recall of cached memories; see `mean_recall`.
        dead: True for heads that are dead in all sequences; see `mc_jax.InnerLoop`.
    """

    blocks: list[int]
    recall: list[list[float | None]]
    dead: list[list[bool]]

    @property
    def rows(self) -> list[Row]:
        """One row per block with the recall of each head; dead heads are marked."""
        rows: dict[int, Row] = {block: {"block": str(block)} for block in self.blocks}
        for block, head, recall, dead in self._heads():
            rows[block][f"head {head}"] = f"{show_recall(recall)} {'dead' if dead else ''}".strip()
        return list(rows.values())

    @property
    def warning(self) -> str | None:
        """One line that names dead heads, and other heads with a recall of about 0; or None."""
        dead, low = [], []
        for block, head, recall, is_dead in self._heads():
            if is_dead:
                dead.append(f"block {block} head {head}")
            elif recall is not None and recall < LOW_RECALL:
                low.append(f"block {block} head {head}")
        parts = [f"dead: {', '.join(dead)}"] if dead else []
        parts += [f"recall below {LOW_RECALL}: {', '.join(low)}"] if low else []
        return f"warning: {'; '.join(parts)}" if parts else None

    @property
    def notes(self) -> list[str]:
        """Definition of recall, a note on undefined values if there are any, and the warning."""
        undefined = any(recall is None for _, _, recall, _ in self._heads())
        return [NOTE, *[UNDEFINED] * undefined, *([] if self.warning is None else [self.warning])]

    def _heads(self) -> Iterator[tuple[int, int, float | None, bool]]:
        for block, recalls, dead in zip(self.blocks, self.recall, self.dead, strict=True):
            for head, recall in enumerate(recalls):
                yield block, head, recall, dead[head]


def first_window(tokens: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Return the first tokens of a text, int32 [1, t], as many as a training example has."""
    return tokens[None, : int(config.data.mean_tokens)].astype(np.int32)


def measure_heads(model: LanguageModel, tokens: np.ndarray) -> HeadReport | None:
    """Return recall and dead heads on tokens [b, t]; None if no block has a memory."""
    if not any(isinstance(layer, MCConfig) for layer in model.config.block_layers):
        return None
    _, traces = jax.jit(lambda tokens: model.inspect(tokens))(tokens)
    return summarize_heads(traces)


def summarize_heads(traces: Sequence[Trace | None]) -> HeadReport | None:
    """Return recall and dead heads from one trace per block; None if there is no trace."""
    found = {block: trace for block, trace in enumerate(traces) if trace is not None}
    if not found:
        return None
    return HeadReport(
        blocks=list(found),
        recall=[mean_recall(np.asarray(trace.recall)) for trace in found.values()],
        dead=[[bool(x) for x in trace.dead_heads.all(axis=0)] for trace in found.values()],
    )


def mean_recall(recall: np.ndarray) -> list[float | None]:
    """Return the mean recall of each head over sequences and segments, from recall [b, n, h].

    The last segment is omitted, because no token reads its cached memory. None if there is no other
    segment, or if the mean is not finite.
    """
    _, segments, heads = recall.shape
    if segments == 1:
        return [None] * heads
    means = recall[:, :-1].mean(axis=(0, 1), dtype=np.float64).tolist()
    return [mean if math.isfinite(mean) else None for mean in means]


def show_recall(recall: float | None) -> str:
    """Return a recall as text; a dash for None."""
    return "–" if recall is None else f"{recall:.3g}"


def print_heads(console: Console, report: HeadReport) -> None:
    """Print recall and dead heads as a table, and the warning."""
    console.print(ResultTable(TITLE, report.rows, [], {}, "").table())
    for line in report.notes:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
