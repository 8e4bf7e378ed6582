"""Weight of the gates on the segment of a needle."""

from dataclasses import dataclass

import numpy as np

from mc_core.aggregations import AGGREGATIONS
from mc_core.errors import UserError
from train.data.encoded_text import Text


@dataclass(frozen=True)
class Needle:
    """Gate weights that later tokens give to the segment of a needle.

    Arrays are [layers, heads]. Ranks are among the cached segments, 1 for the largest weight. Equal
    weights share the lowest rank, so uniform gates rank no segment first.

    Attributes:
        words: the needle.
        tokens: its tokens.
        segments: the segments that they are in; weights are of all of these together.
        cached: memories that the last token could read from the cache.
        last_weight: the last token's weight.
        last_uniform: this weight under uniform gates.
        last_rank: rank of the last token's weight.
        mean_weight: mean over the tokens after the needle's segment.
        mean_uniform: this mean under uniform gates.
        first_share: share of those tokens for which the needle ranks first.
        constant: the aggregation gives equal weight to all memories.
        blocks: block index of each layer.
    """

    words: str
    tokens: tuple[int, ...]
    segments: tuple[int, ...]
    cached: int
    last_weight: np.ndarray
    last_uniform: float
    last_rank: np.ndarray
    mean_weight: np.ndarray
    mean_uniform: float
    first_share: np.ndarray
    constant: bool
    blocks: tuple[int, ...]

    @property
    def ranks_first(self) -> np.ndarray:
        """Bool [layers, heads]: the last token ranks the needle first, above a uniform weight."""
        return (self.last_rank == 1) & (self.last_weight > self.last_uniform)

    @property
    def where(self) -> str:
        """Segments of the needle, as text."""
        return f"segment{'s' * (len(self.segments) > 1)} {', '.join(map(str, self.segments))}"

    @property
    def uniform_summary(self) -> str:
        """Weight of the needle under uniform gates, as a sentence."""
        return (
            f"equal weights would give it {self.last_uniform:.3f} at the end, "
            f"{self.mean_uniform:.3f} on average"
        )

    @property
    def verdict(self) -> str:
        """Result at the last token, as a sentence."""
        layer, head = np.unravel_index(np.argmax(self.last_weight), self.last_weight.shape)
        most = (
            f"the largest weight is {self.last_weight[layer, head]:.3f} in layer "
            f"{self.blocks[layer]} head {head}, rank {self.last_rank[layer, head]} of "
            f"{self.cached}; uniform {self.last_uniform:.3f}; its mean over all tokens after: "
            f"{self.mean_weight[layer, head]:.3f}"
        )
        if self.constant:
            return f"no: this aggregation gives equal weight to all memories; {most}"
        count, all_ = int(self.ranks_first.sum()), self.ranks_first.size
        begin = "yes" if count else "no"
        return f"{begin}: at the last token {count} of {all_} gates point at {self.where}; {most}"


def find_needle(text: Text, words: str, segment: np.ndarray, aggregation: str) -> np.ndarray:
    """Return the tokens of a needle.

    Args:
        text: the tokens.
        words: the needle.
        segment: [t] each token's segment.
        aggregation: aggregation of the model.

    Raises:
        UserError: the needle is not among the tokens, or no token reads its segment.
    """
    if not AGGREGATIONS[aggregation].reads_cache:
        raise UserError(
            f"--needle: a model with aggregation = {aggregation!r} reads no cached memory"
        )
    tokens = text.find(words)
    if not len(tokens):
        cut = len(text.tokens) < text.total
        inside = f"the first {len(text.tokens):,} tokens; raise --tokens" if cut else "the text"
        raise UserError(f"--needle {words!r}: not in {inside}")
    if segment[tokens[-1]] == segment[-1]:
        raise UserError(
            f"--needle {words!r}: in segment {segment[-1]}, the last one, which no token reads "
            "from the cache; give more text after it"
        )
    return tokens


def weigh_needle(
    words: str,
    tokens: np.ndarray,
    gates: np.ndarray,
    segment: np.ndarray,
    aggregation: str,
    blocks: tuple[int, ...] | None = None,
) -> Needle:
    """Measure the weight of later tokens on a needle's segment.

    Args:
        words: the needle.
        tokens: from `find_needle`.
        gates: [layers, t, h, n + 1], the online memory last.
        segment: [t] each token's segment.
        aggregation: aggregation of the model.
        blocks: block index of each layer; None = 0, 1...
    """
    segments = np.unique(segment[tokens])
    after = segment > segments[-1]
    share = gates[:, after] / gates[:, after].sum(-1, keepdims=True)
    weight = share[..., segments].sum(-1)  # [layers, t, h]
    count = segment[after]
    others = np.delete(share[..., :-1], segments, axis=-1)
    readable = np.delete(np.arange(share.shape[-1] - 1), segments) < count[:, None]
    best = share[..., segments].max(-1, keepdims=True)
    rank = 1 + ((others >= best) & readable[:, None]).sum(-1)
    uniform = len(segments) / (count + 1)
    return Needle(
        words,
        tuple(tokens.tolist()),
        tuple(segments.tolist()),
        cached=int(count[-1]),
        last_weight=weight[:, -1],
        last_uniform=float(uniform[-1]),
        last_rank=rank[:, -1],
        mean_weight=weight.mean(1),
        mean_uniform=float(uniform.mean()),
        first_share=(rank == 1).mean(1),
        constant=not AGGREGATIONS[aggregation].gated,
        blocks=tuple(range(len(gates))) if blocks is None else blocks,
    )
