"""Run cases on both sides and compare: what `mc parity check` does."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from parity import run_jax, run_torch
from parity.cases import Case, Inputs, draw
from parity.compare import Difference, Outcome, compare, compare_rounded, tolerance
from parity.weights import Flat

WORKERS = 2  # XLA compiles one case while Python traces the next


def check(
    cases: Iterable[Case], device: str = "cpu", weights: Flat | None = None
) -> Iterator[Outcome]:
    """Compare cases, and yield their outcomes in order as they are ready.

    Args:
        cases: the cases.
        device: cpu or cuda.
        weights: parameters under JAX's names, in place of drawn ones.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from pool.map(lambda case: check_case(case, device, weights), cases)


def check_case(case: Case, device: str = "cpu", weights: Flat | None = None) -> Outcome:
    """Compare one case."""
    start = time.perf_counter()
    inputs = draw(case)
    weights = run_jax.parameters(case) if weights is None else weights
    if case.dtype == "bfloat16":
        differences = _rounded(case, inputs, weights, device)
    else:
        jax = run_jax.run(case, inputs, weights, device=device)
        torch = run_torch.run(case, inputs, weights, device=device)
        differences = compare(torch, jax, tolerance(case.dtype, device, case.tokens))
    return Outcome(case, differences, time.perf_counter() - start)


def _rounded(case: Case, inputs: Inputs, weights: Flat, device: str) -> tuple[Difference, ...]:
    return compare_rounded(
        run_torch.run(case, inputs, weights, device=device),
        run_jax.run(case, inputs, weights, device=device),
        run_torch.run(case, inputs, weights, "float64", device),
        run_jax.run(case, inputs, weights, "float64", device),
        tolerance("float32", device, case.tokens),
    )
