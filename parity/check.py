"""`mc parity check`: run cases in both frameworks, and compare the results."""

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from parity import run_jax, run_torch
from parity.cases import Case, Inputs, draw
from parity.compare import Difference, Outcome, compare, compare_rounded, tolerance
from parity.leaves import Leaves, stack
from parity.weights import Flat

WORKERS = 2  # XLA compiles one case while Python traces the next


def check(
    cases: Iterable[Case], device: str = "cpu", weights: Flat | None = None
) -> Iterator[Outcome]:
    """Compare cases, and yield their outcomes in order.

    Args:
        cases: cases to compare.
        device: `cpu` or `cuda`.
        weights: parameters with JAX names; None = random parameters.
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
    """Compare a bfloat16 case; if a limit is exceeded, compare three draws together.

    The limit is an estimated rounding error, which has a large variance for few elements.
    """
    allowed = tolerance("float32", device, case.tokens)
    runs = [_run_rounded(case, inputs, weights, device)]
    differences = compare_rounded(*runs[0], allowed)
    if not case.drawn or all(difference.ok for difference in differences):
        return differences
    for seed in (case.seed + 1, case.seed + 2):
        other = case.where(seed=seed)
        runs.append(_run_rounded(other, draw(other), run_jax.parameters(other), device))
    torch, jax, torch_exact, jax_exact = map(stack, zip(*runs, strict=True))
    return compare_rounded(torch, jax, torch_exact, jax_exact, allowed)


def _run_rounded(
    case: Case, inputs: Inputs, weights: Flat, device: str
) -> tuple[Leaves, Leaves, Leaves, Leaves]:
    return (
        run_torch.run(case, inputs, weights, device=device),
        run_jax.run(case, inputs, weights, device=device),
        run_torch.run(case, inputs, weights, "float64", device),
        run_jax.run(case, inputs, weights, "float64", device),
    )
