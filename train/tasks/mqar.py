"""Multi-query associative recall (zoology, arXiv:2312.04927).

A sequence starts with key-value pairs. Each key occurs once more as a query, at which the model
must predict its value. Example with 2 pairs, 12 tokens, keys 1 to 7 and values 8 to 15:

    index   0   1   2   3   4   5   6   7   8   9  10  11
    token   3   9   6  12   3   .   .   .   6   .   .   .
    label                   9               12

The dots are random tokens. The query of a key with gap x = 0, 1, ... is at index 4 + 2x. Gaps are
drawn without replacement, with probabilities proportional to (x + 1)^(a - 1).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from train.config.recall_schema import Length, MQARConfig
from train.tasks.examples import Draw, Example, generator, pad_answers


def make_draw(config: MQARConfig, length: Length, seed: int) -> Draw:
    """Return a function that maps a split and an index to an example of `length`.

    Raises:
        ValueError: the length is not feasible.
    """
    config.check_length(length)
    return partial(_draw, config, length, gap_distribution(config.power, length), seed)


def make_draws(config: MQARConfig, lengths: Sequence[Length], seed: int) -> list[Draw]:
    """Return `make_draw` of each length, padded to equal answers for equal numbers of tokens.

    Raises:
        ValueError: a length is not feasible.
    """
    most = {tokens: max(p for t, p in lengths if t == tokens) for tokens, _ in lengths}
    return [pad_answers(make_draw(config, one, seed), most[one[0]]) for one in lengths]


def gap_distribution(power: float, length: Length) -> np.ndarray:
    """Return the gap probabilities of the first draw, float64 [(tokens - 2 pairs) / 2]."""
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
    # Sampling without replacement by exponential clocks: the order of independent exponential
    # variables with rates `law` is the order of successive draws.
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
