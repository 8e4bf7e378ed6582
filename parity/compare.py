"""Errors between two runs, leaf by leaf, and their tolerances."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parity.cases import Case
from parity.leaves import GRADIENT, Leaf, Leaves

FLOOR = 1e-3  # lower bound of the denominator of relative errors: a reference may be zero
SMALL = 16  # with fewer elements, the RMS of rounding errors has a large variance
LONG = 128  # with more tokens, the float32 tolerances grow


class Tolerance(NamedTuple):
    """Maximum relative RMS errors."""

    forward: float  # outputs, states, pooled keys, gates
    gradient: float


TOLERANCES = {
    ("float64", "cpu"): Tolerance(1e-10, 1e-9),
    ("float64", "cuda"): Tolerance(1e-10, 1e-9),
    ("float32", "cpu"): Tolerance(2e-6, 1e-5),
    ("float32", "cuda"): Tolerance(1e-5, 1e-4),
}


@dataclass(frozen=True)
class Difference:
    """Comparison of one leaf of two runs.

    Attributes:
        name: name of the leaf.
        error: RMS of the difference divided by max(RMS of the reference, `FLOOR`).
        limit: maximum allowed error.
        maximum: largest absolute difference divided by max(largest reference element, `FLOOR`).
        cosine: cosine similarity; 1 if both are zero.
        problem: a mismatch other than the error: missing leaf, shape, dtype or NaNs.
    """

    name: str
    error: float = 0.0
    limit: float = 0.0
    maximum: float = 0.0
    cosine: float = 1.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        """True if the error is within the limit and there is no other mismatch."""
        return not self.problem and self.error <= self.limit

    @property
    def severity(self) -> float:
        """Error divided by the limit; infinite for other mismatches."""
        if self.problem:
            return float("inf")
        return self.error / self.limit if self.limit else float(self.error > 0)

    def describe(self) -> str:
        """Return the difference on one line."""
        if self.problem:
            return f"{self.name}: {self.problem}"
        sign = "<=" if self.ok else ">"
        return f"{self.name}: relative RMS error {self.error:.1e} {sign} {self.limit:.1e}"


@dataclass(frozen=True)
class Outcome:
    """Comparison of all leaves of a case, in forward order."""

    case: Case
    differences: tuple[Difference, ...]
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True if all leaves agree."""
        return all(leaf.ok for leaf in self.differences)

    @property
    def worst(self) -> Difference:
        """The leaf with the largest error relative to its limit."""
        return max(self.differences, key=lambda leaf: leaf.severity)

    @property
    def first_failure(self) -> Difference | None:
        """The first leaf in forward order that differs."""
        return next((leaf for leaf in self.differences if not leaf.ok), None)


def tolerance(dtype: str, device: str, tokens: int) -> Tolerance:
    """Return the tolerance of a dtype; it grows with the length for float32."""
    base = TOLERANCES[dtype, device]
    growth = max(1.0, tokens / LONG) if dtype == "float32" else 1.0
    return Tolerance(*(limit * growth for limit in base))


def compare(actual: Leaves, expected: Leaves, allowed: Tolerance) -> tuple[Difference, ...]:
    """Compare two runs that should be equal up to rounding."""
    return tuple(
        difference(name, left, right, _limit(name, allowed))
        for name, left, right in _paired(actual, expected)
    )


def compare_rounded(
    actual: Leaves,
    expected: Leaves,
    actual_exact: Leaves,
    expected_exact: Leaves,
    rounded: Tolerance,
) -> tuple[Difference, ...]:
    """Compare two bfloat16 runs.

    The limit of a leaf is twice the rounding error of a framework, which is its error against its
    own float64 run: the smaller rounding error of the two frameworks if the leaf has at least
    `SMALL` elements, otherwise the larger one. The limit is at least `rounded`, the tolerance of
    leaves that are computed in float32.
    """
    results = []
    for name, left, right in _paired(actual, expected):
        limit = _limit(name, rounded)
        pairs = ((left, actual_exact.get(name)), (right, expected_exact.get(name)))
        rounding = [
            _error(leaf.value, exact.value)
            for leaf, exact in pairs
            if leaf and exact and leaf.value.shape == exact.value.shape
        ]
        if left and len(rounding) == 2:
            limit = max(limit, 2 * (min if left.value.size >= SMALL else max)(rounding))
        results.append(difference(name, left, right, limit))
    return tuple(results)


def difference(name: str, actual: Leaf | None, expected: Leaf | None, limit: float) -> Difference:
    """Compare one leaf."""
    if actual is None or expected is None:
        side = "torch" if actual is None else "jax"
        return Difference(name, limit=limit, problem=f"missing in {side}")
    if actual.value.shape != expected.value.shape:
        problem = f"shape {actual.value.shape} in torch, {expected.value.shape} in jax"
        return Difference(name, limit=limit, problem=problem)
    if actual.dtype != expected.dtype:
        problem = f"dtype {actual.dtype} in torch, {expected.dtype} in jax"
        return Difference(name, limit=limit, problem=problem)
    left, right = (x.value.astype(np.float64) for x in (actual, expected))
    finite = np.isfinite(left) & np.isfinite(right)
    counts = [int(np.size(x) - np.isfinite(x).sum()) for x in (left, right)]
    if counts[0] != counts[1] or int(np.size(left) - finite.sum()) != counts[0]:
        problem = f"{counts[0]} NaN or infinite values in torch, {counts[1]} in jax"
        return Difference(name, limit=limit, problem=problem)
    if left.size and not finite.any():
        return Difference(name, limit=limit, problem="no finite value in either framework")
    left, right = left[finite], right[finite]
    return Difference(
        name,
        error=_error(left, right),
        limit=limit,
        maximum=_largest(left - right) / max(_largest(right), FLOOR),
        cosine=_cosine(left, right),
    )


def _paired(actual: Leaves, expected: Leaves) -> Iterator[tuple[str, Leaf | None, Leaf | None]]:
    for name in dict.fromkeys((*expected, *actual)):
        yield name, actual.get(name), expected.get(name)


def _limit(name: str, allowed: Tolerance) -> float:
    return allowed.gradient if name.startswith(GRADIENT) else allowed.forward


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max()) if x.size else 0.0


def _error(left: np.ndarray, right: np.ndarray) -> float:
    return _rms(np.subtract(left, right, dtype=np.float64)) / max(_rms(right), FLOOR)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    if not lengths:
        return float(not left.any() and not right.any())
    return float(np.vdot(left, right)) / lengths
