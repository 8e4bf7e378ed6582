"""Associative-recall slices of a text: n-grams that recur in a window, and their counts.

The text is split into windows as in validation: window m reads tokens m w to m w + w, and predicts
all of them but the first. With x the tokens of the text and i the index of a predicted token, let

    g(i) = x[i - n + 1 .. i]    the n-gram that ends at i
    c(i) = x[i - n + 1 .. i - 1]    its first n - 1 tokens, the context of token i

n-grams lie within a window; the first n - 2 predicted tokens of a window have none. With j ranging
over the earlier n-grams of the same window, n - 1 <= j - m w and j < i, token i is

    a hit     if g(j) = g(i) for some j; its distance is i - j for the last such j
    a miss    if it is not a hit, and c(j) = c(i) for some j
    other     otherwise.

Occurrences may overlap. A hit can be predicted by recall from the window, as in the analysis of
Zoology (arXiv:2312.04927, "AR hits"); a miss is a context whose recalled continuation
is wrong. The count of an n-gram is the number of its occurrences in the training text. Rare n-grams
must be recalled; frequent ones can also be known from training.
"""

from typing import NamedTuple

import numpy as np

from mc_core.errors import UserError
from train.data.sources import Tokens

OTHER, MISS, HIT = 0, 1, 2
KINDS = {"hits": HIT, "misses": MISS, "other tokens": OTHER}
DISTANCE_EDGES = (1, 16, 64, 256, 1024)  # smallest distance of each bucket; the last one is open
COUNT_EDGES = (0, 1, 10, 100, 1_000, 10_000)
RARE = 100  # n-grams with a smaller count are rare
BLOCK = 2**20  # training tokens that are counted at once


class Recurrence(NamedTuple):
    """Kinds of the predicted tokens 1, 2, ... of a text; see the module's docstring."""

    kind: np.ndarray  # int8 [t]: OTHER, MISS or HIT
    distance: np.ndarray  # int64 [t]: tokens to the last occurrence of the n-gram; 0 if no hit


def find_recurrences(tokens: np.ndarray, n: int, window: int, vocab_size: int) -> Recurrence:
    """Return the kind and distance of tokens 1, 2, ... of a text.

    Args:
        tokens: integers [t + 1] below `vocab_size`.
        n: tokens per n-gram, >= 2.
        window: predicted tokens per window.
        vocab_size: number of different tokens.

    Raises:
        UserError: n-grams do not fit in 64 bits.
    """
    places = np.arange(len(tokens) - 1)  # of the predicted tokens; the index is one larger
    ends = 1 + places[places % window >= n - 2]
    starts = ends - n + 1
    whole = pack_ngrams(tokens, n, vocab_size)[starts]
    contexts = pack_ngrams(tokens, n - 1, vocab_size)[starts]
    window_of = (ends - 1) // window
    distance = np.zeros(len(places), np.int64)
    distance[ends - 1] = _last_distance(whole, ends, window_of)
    seen = np.zeros(len(places), bool)
    seen[ends - 1] = _last_distance(contexts, ends, window_of) > 0
    kind = np.select([distance > 0, seen], [HIT, MISS], OTHER)
    return Recurrence(kind.astype(np.int8), distance)


def _last_distance(keys: np.ndarray, ends: np.ndarray, window_of: np.ndarray) -> np.ndarray:
    """Return the distance to the previous equal key in the same window; 0 if there is none."""
    # The sort is stable, so equal keys stay in the order of the text.
    order = np.argsort(keys, kind="stable")
    before, after = order[:-1], order[1:]
    equal = (keys[before] == keys[after]) & (window_of[before] == window_of[after])
    distance = np.zeros(len(keys), np.int64)
    distance[after[equal]] = (ends[after] - ends[before])[equal]
    return distance


def pack_ngrams(tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Return the n-grams of tokens [t] as integers, uint64 [t - n + 1], distinct and exact.

    The n-gram that starts at i is sum over k of x[i + k] vocab_size^(n - 1 - k).

    Raises:
        UserError: n-grams do not fit in 64 bits.
    """
    largest = max_ngram(vocab_size)
    if n > largest:
        raise UserError(f"--ngram = {n}: must be <= {largest} for a vocabulary of {vocab_size}")
    count = max(0, len(tokens) - n + 1)
    keys = np.zeros(count, np.uint64)
    for k in range(n):
        keys *= np.uint64(vocab_size)
        keys += tokens[k : k + count].astype(np.uint64)
    return keys


def max_ngram(vocab_size: int) -> int:
    """Return the largest n for which n-grams fit in 64 bits."""
    n = 1
    while vocab_size ** (n + 1) <= 2**64 and n < 64:
        n += 1
    return n


def count_ngrams(text: Tokens, wanted: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Return the numbers of occurrences in a text of packed n-grams, int64 [m].

    The text is processed in blocks, so memory is proportional to the number of wanted n-grams.

    Args:
        text: tokens [t], such as the training text.
        wanted: packed n-grams, uint64 [m]; see `pack_ngrams`.
        n: tokens per n-gram.
        vocab_size: number of different tokens.
    """
    known, inverse = np.unique(wanted, return_inverse=True)
    totals = np.zeros(len(known), np.int64)
    if not len(known):
        return totals
    for start in range(0, len(text) - n + 1, BLOCK):
        block = text[start : start + BLOCK + n - 1]
        found, counts = np.unique(pack_ngrams(block, n, vocab_size), return_counts=True)
        place = np.minimum(np.searchsorted(known, found), len(known) - 1)
        same = known[place] == found
        totals[place[same]] += counts[same]
    return totals[inverse]


def count_hits(
    tokens: np.ndarray, found: Recurrence, text: Tokens, n: int, vocab_size: int
) -> np.ndarray:
    """Return the count in `text` of the n-gram of each hit, int64 [t]; -1 for other tokens.

    Args:
        tokens: the tokens [t + 1] in which the hits were found.
        found: kinds of tokens 1, 2, ...
        text: tokens of the training text.
        n: tokens per n-gram.
        vocab_size: number of different tokens.
    """
    hits = np.flatnonzero(found.kind == HIT)
    wanted = pack_ngrams(tokens, n, vocab_size)[hits + 2 - n]
    counts = np.full(len(found.kind), -1, np.int64)
    counts[hits] = count_ngrams(text, wanted, n, vocab_size)
    return counts


class Slice(NamedTuple):
    """A set of tokens.

    Attributes:
        group: `all`, `kind`, `distance`, `rare` (rare hits by distance) or `count`; the slices of
            a group are disjoint.
        name: description of the tokens.
        low: smallest distance or count.
        high: largest distance or count; None for no limit.
        members: bool [t].
    """

    group: str
    name: str
    low: int | None
    high: int | None
    members: np.ndarray


def make_slices(found: Recurrence, counts: np.ndarray) -> list[Slice]:
    """Return all tokens, the kinds, and the hits by distance and count; empty slices too.

    Args:
        found: kinds and distances of the tokens.
        counts: from `count_hits`.
    """
    hit = found.kind == HIT
    slices = [Slice("all", "all tokens", None, None, np.ones(len(hit), bool))]
    slices += [Slice("kind", name, None, None, found.kind == kind) for name, kind in KINDS.items()]
    rare = hit & (counts < RARE)
    for group, values, edges, chosen, word in (
        ("distance", found.distance, DISTANCE_EDGES, hit, "distance"),
        ("rare", found.distance, DISTANCE_EDGES, rare, "rare,"),
        ("count", counts, COUNT_EDGES, hit, "count"),
    ):
        for low, following in zip(edges, (*edges[1:], None), strict=True):
            high = None if following is None else following - 1
            members = chosen & (values >= low) & (high is None or values <= high)
            slices.append(Slice(group, f"{word} {span(low, high)}", low, high, members))
    return slices


def span(low: int, high: int | None) -> str:
    """Return a range of integers as text."""
    if high is None:
        return f">= {low}"
    return str(low) if low == high else f"{low}-{high}"
