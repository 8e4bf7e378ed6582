"""A mixture of infinite data sets with exact shares."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, SupportsIndex

import grain


class Mixture(grain.sources.RandomAccessDataSource):
    """Interleaves data sets, so that any first k elements have the given shares up to rounding.

    The data set of an element depends only on its index, so a position in the mixture is one
    number. The mixture of `grain.MapDataset.mix` rounds the shares to multiples of 1% of the
    smallest one.

    Args:
        datasets: data sets with more elements than are read.
        weights: their shares, relative to each other.
    """

    def __init__(self, datasets: Sequence[grain.MapDataset], weights: Sequence[float]):
        self._datasets = datasets
        exact = [Fraction(str(weight)) for weight in weights]  # 0.7 is 7/10
        # Share of a data set among itself and the following ones.
        self._shares = [weight / sum(exact[i:]) for i, weight in enumerate(exact)]

    def __len__(self) -> int:
        return 2**48

    def __repr__(self) -> str:
        # Grain includes it in the state of an iterator.
        return f"Mixture(shares={[str(share) for share in self._shares]})"

    def __getitem__(self, index: SupportsIndex) -> Any:
        number, key = self.locate(int(index))
        return self._datasets[number][key]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the data set of an element, and its index there.

        Of the elements 0, 1, ... that the data sets before it leave, a data set of share p has
        those i with floor((i + 1) p) > floor(i p).
        """
        for number, share in enumerate(self._shares):
            before = index * share.numerator // share.denominator
            if (index + 1) * share.numerator // share.denominator > before:
                return number, before
            index -= before
        raise AssertionError("the last share is 1")
