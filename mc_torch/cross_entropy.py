"""Cross-entropy of labels, in blocks of tokens: the logits of all tokens never exist at once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from mc_torch.ids import safe_ids
from mc_torch.numerics import Array, remat

# Logits that may exist at once, on a device: 128 MiB in float32.
MAX_LOGITS = 2**25


class LabelScores(NamedTuple):
    """Scores of labels [b, t]."""

    losses: Array  # [b, t], cross-entropy in nats; 0 where a label is not read
    best: Array  # int64 [b, t], ids of the largest logits


def cross_entropy(logits: Array, labels: Array, read: Array | None = None) -> Array:
    """Return the losses [b, t], in nats, of labels [b, t] under logits [b, t, s].

    A label that is out of range gives NaN.

    Args:
        logits: [b, t, s], of the state dtype.
        labels: integers [b, t].
        read: bool [b, t], False at labels that are ignored, with a loss of 0; None = read all.
    """
    labels, out_of_range = safe_ids(labels, logits.shape[-1], read)
    chosen = torch.gather(logits, -1, labels[..., None])[..., 0]
    losses = torch.logsumexp(logits, dim=-1) - chosen
    losses = losses if read is None else torch.where(read, losses, 0)
    return torch.where(out_of_range, torch.nan, losses)


def label_scores(
    project: Callable[[Array], Array],
    x: Array,
    labels: Array,
    vocab_size: int,
    read: Array | None = None,
) -> LabelScores:
    """Score labels [b, t] under the logits of tokens, which are computed in blocks of tokens.

    The backward pass computes the logits of each block again. If there are at most `MAX_LOGITS`
    logits, there is one block, and they are saved.

    Args:
        project: maps tokens [b, t, d] to logits [b, t, vocab_size], token by token.
        x: tokens [b, t, d].
        labels: integers [b, t]; see `cross_entropy`.
        vocab_size: number of logits of a token.
        read: bool [b, t]; see `cross_entropy`.
    """
    b, t = labels.shape
    if b * t * vocab_size <= MAX_LOGITS:
        return _scores(project, x, labels, read)
    size = max(1, MAX_LOGITS // vocab_size)
    reads = [None] * -(-b * t // size) if read is None else read.reshape(1, -1).split(size, dim=1)
    blocks = zip(
        x.reshape(1, b * t, -1).split(size, dim=1),
        labels.reshape(1, -1).split(size, dim=1),
        reads,
        strict=True,
    )
    score = remat(partial(_scores, project))
    losses, best = zip(*(score(*block) for block in blocks), strict=True)
    return LabelScores(*(torch.cat(y, dim=1).reshape(b, t) for y in (losses, best)))


def _scores(
    project: Callable[[Array], Array], x: Array, labels: Array, read: Array | None
) -> LabelScores:
    logits = project(x)
    return LabelScores(cross_entropy(logits, labels, read), logits.argmax(dim=-1))
