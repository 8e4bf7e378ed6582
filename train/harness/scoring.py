"""Log-likelihoods of continuations, in padded batches; each distinct context is read once."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.errors import NotFiniteError
from mc_core.generation import make_blocks
from mc_jax import LanguageModel, prefill

BATCH_TOKENS, BATCH_ROWS = 16_384, 64  # limits of an automatic batch
Ids = Sequence[int]


class Likelihood(NamedTuple):
    """Log-probability of a continuation, and whether greedy decoding returns it."""

    log_probability: float  # nats
    greedy: bool


class Context(NamedTuple):
    """A context and the requests that share it."""

    ids: tuple[int, ...]
    requests: list[int]  # indices of the requests
    longest: int  # tokens of the longest continuation

    @property
    def capacity(self) -> int:
        """Number of tokens that its cache must hold: a power of two, to limit compilation."""
        return power_of_two(len(self.ids) + self.longest)


def truncate_middle(ids: Ids, limit: int | None) -> Ids:
    """Return at most `limit` tokens: the first and the last ones, in halves; None = no limit."""
    if limit is None or len(ids) <= limit:
        return ids
    end = limit - limit // 2
    return [*ids[: limit // 2], *ids[len(ids) - end :]]


def power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()


def batch_rows(capacity: int, batch_size: int | None) -> int:
    """Return the rows of a batch of sequences of `capacity` tokens.

    Args:
        capacity: tokens per sequence, a power of two.
        batch_size: number of rows; None = as many as fit in `BATCH_TOKENS` and `BATCH_ROWS`.
    """
    return batch_size or max(1, min(BATCH_ROWS, BATCH_TOKENS // capacity))


def score(
    model: LanguageModel,
    requests: Sequence[tuple[Ids, Ids]],
    batch_size: int | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Likelihood]:
    """Return the log-likelihoods of continuations, given their contexts.

    Requests with the same context share its cache, so that the context is read once. Contexts are
    sorted by length, longest first, and padded to blocks; batches are filled with padding rows.

    Args:
        model: the language model, with `constant` or `fenwick` segments.
        requests: ids of contexts, at least one each, and of continuations.
        batch_size: contexts per batch; None = see `batch_rows`.
        advance: called with the number of requests of each finished batch.

    Raises:
        ValueError: an id is out of range, or the segments cannot stream.
        NotFiniteError: the model's logits are not finite.
    """
    found: dict[int, Likelihood] = {}
    graphdef, state = nnx.split(model)
    follow = partial(_make_follow(graphdef), nnx.to_pure_dict(state))
    for batch in _batches(requests, batch_size):
        rows = batch_rows(batch[0].capacity, batch_size)
        contexts = [*(context.ids for context in batch), *[(0,)] * (rows - len(batch))]
        last, cache = prefill(model, contexts, batch[0].capacity)
        for turn in range(max(len(context.requests) for context in batch)):
            own = {
                row: context.requests[turn]
                for row, context in enumerate(batch)
                if turn < len(context.requests)
            }
            continuations: list[Ids] = [()] * rows
            for row, number in own.items():
                continuations[row] = requests[number][1]
            totals, greedy = _score_rows(follow, continuations, last, cache)
            for row, number in own.items():
                found[number] = Likelihood(float(totals[row]), bool(greedy[row]))
        if not all(np.isfinite(found[n].log_probability) for c in batch for n in c.requests):
            raise NotFiniteError("the logits of a request are not finite")
        advance(sum(len(context.requests) for context in batch))
    return [found[number] for number in range(len(requests))]


def _batches(
    requests: Sequence[tuple[Ids, Ids]], batch_size: int | None
) -> Iterator[list[Context]]:
    """Yield the distinct contexts, longest first, in batches of the same capacity."""
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (ids, _) in enumerate(requests):
        shared[tuple(ids)].append(number)
    contexts = [
        Context(ids, numbers, max(len(requests[number][1]) for number in numbers))
        for ids, numbers in shared.items()
    ]
    by_capacity: dict[int, list[Context]] = defaultdict(list)
    for context in sorted(contexts, key=lambda context: -len(context.ids)):
        by_capacity[context.capacity].append(context)
    for capacity in sorted(by_capacity, reverse=True):
        own, rows = by_capacity[capacity], batch_rows(capacity, batch_size)
        for start in range(0, len(own), rows):
            yield own[start : start + rows]


def _score_rows(
    follow: Callable[..., Any], continuations: Sequence[Ids], last: jax.Array, cache: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-probability, float64 [b], and greediness, bool [b], of one row each.

    Args:
        follow: program of `_make_follow`, with parameters.
        continuations: ids of each row, possibly none.
        last: logits after each row's context, [b, vocab_size].
        cache: cache after the contexts; unchanged.
    """
    totals, greedy = np.zeros(len(continuations)), np.ones(len(continuations), bool)
    if not any(map(len, continuations)):
        return totals, greedy
    blocks = make_blocks(continuations)
    for number, (tokens, padding) in enumerate(blocks):
        final = number == len(blocks) - 1
        total, best, last, cache = follow(tokens, padding, cache, last, final=final)
        totals += np.asarray(total, np.float64)
        greedy &= np.asarray(best)
    return totals, greedy


@lru_cache(maxsize=16)
def _make_follow(graphdef: nnx.GraphDef) -> Any:
    """Return the compiled function that scores the next tokens of streams.

    It maps parameters, tokens and padding [b, w], the cache and the last logits [b, s] to the sum
    of the tokens' log-probabilities [b], whether all of them have the top logit [b], and the new
    last logits and cache. The model does not read a single token if it is `final`.
    """

    def follow(
        params: Any, tokens: jax.Array, padding: jax.Array, cache: Any, last: jax.Array, final: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        before = last[:, None]
        if not (final and tokens.shape[1] == 1):
            model = nnx.merge(graphdef, params)
            logits, cache = model.extend(tokens, cache, padding=padding)
            before = jnp.concatenate([before, logits[:, :-1]], axis=1)
            count = jnp.sum(~padding, axis=1)[:, None]
            index = jnp.maximum(count - 1, 0)[:, :, None]
            last = jnp.where(count > 0, jnp.take_along_axis(logits, index, axis=1)[:, 0], last)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(before), tokens[:, :, None], axis=-1)
        total = jnp.sum(jnp.where(padding, 0, chosen[:, :, 0]), axis=1)
        best = jnp.all((jnp.argmax(before, axis=-1) == tokens) | padding, axis=1)
        return total, best, last, cache

    return jax.jit(follow, static_argnames="final")
