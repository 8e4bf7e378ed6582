"""Multi-query associative recall (zoology, arXiv:2312.04927).

A sequence begins with pairs of a key and its value; each key comes once more, later, and what
follows it is asked for. Of a sequence with 2 pairs and 12 tokens, keys 1 to 7, values 8 to 15:

    place   0   1   2   3   4   5   6   7   8   9  10  11
    token   3   9   6  12   3   .   .   .   6   .   .   .
    label                   9               12

The dots are random tokens. Place 4 + 2x asks for a key whose gap is x = 0, 1, ...; gaps differ, and
are drawn, one after another, with probabilities that fall as (x + 1)^(a - 1).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from train.config.recall_schema import Length, MQARConfig
from train.tasks.examples import Draw, Example, generator, widen


def make_draw(config: MQARConfig, length: Length, seed: int) -> Draw:
    """Return the function from split and index to an example of a length (tokens, pairs).

    Raises:
        ValueError: the length is not possible.
    """
    config.check_length(length)
    return partial(_draw, config, length, gap_law(config.power, length), seed)


def make_draws(config: MQARConfig, lengths: Sequence[Length], seed: int) -> list[Draw]:
    """Return `make_draw` of each length; those with the same tokens have as many answers.

    Raises:
        ValueError: a length is not possible.
    """
    most = {tokens: max(p for t, p in lengths if t == tokens) for tokens, _ in lengths}
    return [widen(make_draw(config, one, seed), most[one[0]]) for one in lengths]


def gap_law(power: float, length: Length) -> np.ndarray:
    """Return the probability of each gap, the first one drawn; float64 [(tokens - 2 pairs) / 2]."""
    tokens, pairs = length
    weight = np.arange(1, (tokens - 2 * pairs) // 2 + 1) ** (power - 1.0)
    return weight / weight.sum()


def _draw(
    config: MQARConfig, length: Length, law: np.ndarray, seed: int, split: str, index: int
) -> Example:
    tokens, pairs = length
    half = config.vocab_size // 2
    rng = generator(seed, split, *length, index)
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(config.vocab_size - half, pairs, replace=False)
    # The first of independent exponential clocks to ring is x with its probability; so is the
    # next among the others: draws without replacement, all at once.
    gaps = np.argsort(rng.standard_exponential(len(law)) / law)[:pairs]
    places = 2 * pairs + 2 * gaps
    sequence = np.zeros(tokens, np.int64)
    if config.random_non_queries:
        sequence[2 * pairs :] = rng.integers(config.vocab_size, size=tokens - 2 * pairs)
    sequence[0 : 2 * pairs : 2], sequence[1 : 2 * pairs : 2] = keys, values
    sequence[places] = keys
    return Example(
        sequence.astype(np.int32),
        places.astype(np.int32),
        values.astype(np.int32),
        np.ones(pairs, np.float32),
        np.arange(0, 2 * pairs, 2, dtype=np.int32),
    )
