"""Cross-entropy of labels, in blocks of tokens: the logits of all tokens never exist at once."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mc_jax.ids import safe_ids
from mc_jax.numerics import Array
from mc_jax.sharding import RULES, automatic_axes

# Logits that may exist at once, on a device: 128 MiB in float32.
MAX_LOGITS = 2**25


class LabelScores(NamedTuple):
    """Scores of labels [b, t]."""

    losses: Array  # [b, t], cross-entropy in nats; 0 where a label is not read
    best: Array  # int32 [b, t], ids of the largest logits


def cross_entropy(
    logits: Array, labels: Array | np.ndarray, read: Array | np.ndarray | None = None
) -> Array:
    """Return the losses [b, t], in nats, of labels [b, t] under logits [b, t, s].

    A label that is out of range gives NaN.

    Args:
        logits: [b, t, s], of the state dtype.
        labels: integers [b, t].
        read: bool [b, t], False at labels that are ignored, with a loss of 0; None = read all.
    """
    labels, out_of_range = safe_ids(labels, logits.shape[-1], read)
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    losses = jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - chosen
    losses = losses if read is None else jnp.where(read, losses, 0)
    return jnp.where(out_of_range, jnp.nan, losses)


def label_scores(
    project: Callable[[Array], Array],
    x: Array,
    labels: Array | np.ndarray,
    vocab_size: int,
    read: Array | np.ndarray | None = None,
) -> LabelScores:
    """Score labels [b, t] under the logits of tokens, which are computed in blocks of tokens.

    The backward pass computes the logits of each block again. If there are at most `MAX_LOGITS`
    logits per device, there is one block, and they are saved. On a mesh, the axes `heads` and
    `context` share the tokens of a sequence.

    Args:
        project: maps tokens [b, t, d] to logits [b, t, vocab_size], token by token. It is a pytree,
            such as `jax.tree_util.Partial`, of its parameters.
        x: tokens [b, t, d].
        labels: integers [b, t]; see `cross_entropy`.
        vocab_size: number of logits of a token.
        read: bool [b, t]; see `cross_entropy`.
    """
    labels = jnp.asarray(labels)
    read = jnp.ones(labels.shape, bool) if read is None else jnp.asarray(read)
    rows, columns = _token_axes(*labels.shape)
    sizes = automatic_axes()
    tokens = labels.size // int(np.prod([sizes[axis] for axis in (*rows, *columns)], dtype=int))
    if tokens * vocab_size <= MAX_LOGITS:
        return _scores(project, x, labels, read)
    blocks = _num_blocks(tokens, vocab_size)
    score = partial(_scores_in_blocks, blocks=blocks)
    if not (rows or columns):
        return score(project, x, labels, read)
    # Otherwise XLA would reduce the gradient of the parameters over the devices in every block.
    by_token = PartitionSpec(rows or None, columns or None)
    return jax.shard_map(
        score,
        in_specs=(PartitionSpec(), by_token, by_token, by_token),
        out_specs=by_token,
        axis_names={*rows, *columns},
        check_vma=False,
    )(project, x, labels, read)


def _token_axes(b: int, t: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the mesh axes that share the rows, and those that share the tokens of a row."""
    sizes = automatic_axes()
    shared: list[tuple[str, ...]] = []
    for length, names in ((b, RULES["batch"]), (t, (*RULES["tokens"], *RULES["heads"]))):
        axes: tuple[str, ...] = ()
        for name in names:
            size = sizes.get(name, 1)
            if size > 1 and length % size == 0:
                axes, length = (*axes, name), length // size
        shared.append(axes)
    return shared[0], shared[1]


def _num_blocks(tokens: int, vocab_size: int) -> int:
    """Return the number of blocks; a divisor of the tokens, so that none is padded, if possible."""
    least = -(-tokens * vocab_size // MAX_LOGITS)
    return next((n for n in range(least, min(2 * least, tokens) + 1) if tokens % n == 0), least)


def _scores_in_blocks(
    project: Callable[[Array], Array], x: Array, labels: Array, read: Array, *, blocks: int
) -> LabelScores:
    b, t = labels.shape
    size = -(-b * t // blocks)

    def split(y: Array) -> Array:
        y = y.reshape(b * t, *y.shape[2:])
        y = jnp.pad(y, [(0, blocks * size - b * t)] + [(0, 0)] * (y.ndim - 1))
        return y.reshape(blocks, 1, size, *y.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)
    def score(inputs: tuple[Array, Array, Array]) -> LabelScores:
        return _scores(project, *inputs)

    found = jax.lax.map(score, (split(x), split(labels), split(read)))
    return jax.tree.map(lambda y: y.reshape(-1)[: b * t].reshape(b, t), found)


def _scores(project: Callable[[Array], Array], x: Array, labels: Array, read: Array) -> LabelScores:
    logits = project(x)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return LabelScores(cross_entropy(logits, labels, read), best)
