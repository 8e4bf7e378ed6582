"""`python -m tools.mutants`: inject each fault of the tables; a test must fail.

Exit code 0 only if the tests pass without a fault, and every fault applies and is caught.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from tools.mutants.runner import CAUGHT, MutantOutcome, check_baseline, run_mutants
from tools.mutants.table import Mutant, choose, load_mutants


def main(words: Sequence[str] | None = None) -> int:
    """Run the check, and return the exit code."""
    options = _parse(words)
    try:
        mutants = choose(load_mutants(), options.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print(*(f"{mutant.name}: {mutant.fault}" for mutant in mutants), sep="\n")
        return 0
    start = time.monotonic()
    if not options.no_baseline and not check_baseline(
        mutants, options.jobs, options.timeout, _report
    ):
        print("the tests do not pass without a fault", file=sys.stderr)
        return 1
    outcomes = run_mutants(mutants, options.jobs, options.timeout, options.full, _report)
    print(make_table(mutants, outcomes, time.monotonic() - start))
    return 0 if all(found.status == CAUGHT for found in outcomes.values()) else 1


def make_table(
    mutants: Sequence[Mutant], outcomes: dict[str, MutantOutcome], seconds: float
) -> str:
    """Return a Markdown table with one row per mutant, and a summary line."""
    rows = [
        f"| {mutant.name} | {mutant.file} | {mutant.fault} | {found.status} | "
        f"{found.test.replace('|', ' ')} | {found.seconds:.0f} |"
        for mutant in mutants
        if (found := outcomes[mutant.name])
    ]
    caught = sum(found.status == CAUGHT for found in outcomes.values())
    return "\n".join(
        [
            "| mutant | file | fault | result | first failure | s |",
            "| --- | --- | --- | --- | --- | ---: |",
            *rows,
            "",
            f"{caught} of {len(outcomes)} mutants caught, {seconds:.0f} s.",
        ]
    )


def _report(name: str, found: MutantOutcome) -> None:
    line = f"{found.status:9} {name} {found.test} {found.seconds:.0f} s"
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or patterns such as 'jax-*'; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="parallel mutants (default: 2)")
    parser.add_argument(
        "--full", action="store_true", help="after the expected tests, run the whole quick suite"
    )
    parser.add_argument(
        "--no-baseline", action="store_true", help="do not run the tests without a fault first"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds for one run of pytest (default: 3600)"
    )
    parser.add_argument("--list", action="store_true", help="print names and faults, and stop")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
