"""Bootstrap intervals of means over windows."""

from typing import NamedTuple

import numpy as np

SAMPLES = 1000
LEVELS = (0.025, 0.975)  # a 95% interval


class Interval(NamedTuple):
    """A mean and its 95% interval; None where it is undefined."""

    mean: float | None
    low: float | None
    high: float | None


class Resampling:
    """Resamples windows with replacement; the same samples serve all slices and runs.

    Tokens of a window are dependent, so whole windows are drawn. Differences of two runs are
    paired: both are computed on the same windows.

    Args:
        windows: number of windows.
        seed: random seed.
    """

    def __init__(self, windows: int, seed: int):
        rng = np.random.default_rng(seed)
        share = np.full(windows, 1 / windows)
        self._times = rng.multinomial(windows, share, SAMPLES)  # [samples, windows]

    def mean(self, totals: np.ndarray, counts: np.ndarray) -> Interval:
        """Return the mean per token, sum(totals) / sum(counts), and its percentile interval.

        The interval is undefined if fewer than two windows have tokens. Samples without tokens are
        ignored.

        Args:
            totals: float64 [windows], sums over the tokens of a window.
            counts: integers [windows], numbers of these tokens.
        """
        size = int(counts.sum())
        if not size:
            return Interval(None, None, None)
        mean = float(totals.sum()) / size
        if np.count_nonzero(counts) < 2:
            return Interval(mean, None, None)
        sampled = self._times @ counts
        means = (self._times @ totals)[sampled > 0] / sampled[sampled > 0]
        low, high = np.quantile(means, LEVELS)
        return Interval(mean, float(low), float(high))
