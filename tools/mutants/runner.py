"""Runs of pytest on copies of the working tree, with and without a fault."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tools.mutants.table import ROOT, Mutant, find_test_file, join

OPTIONS = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow")
OWN_TEST = "test_mutants"  # fails on every mutated tree, because the table no longer applies
CAUGHT, PASSED = "caught", "survived"
# Meaning of pytest's exit codes; only 1 is a caught fault.
CODES = {0: PASSED, 1: CAUGHT, 2: "does not import", 5: "selects no test"}


class MutantOutcome(NamedTuple):
    """Result of the tests on a tree.

    Attributes:
        status: `caught` (a test failed), `survived` (all passed), or why it is neither.
        test: the first test that failed, or what went wrong.
        seconds: wall-clock time.
    """

    status: str
    test: str
    seconds: float


Report = Callable[[str, MutantOutcome], None]


def check_baseline(mutants: Sequence[Mutant], jobs: int, limit: float, report: Report) -> bool:
    """Run all selected tests on the unchanged tree, and report the outcome of each file.

    Returns:
        True if all tests pass; otherwise, failures with a fault are meaningless.
    """
    with copied() as tree, ThreadPoolExecutor(jobs) as pool:
        runs = {
            pool.submit(run_tests, tree, name, expression, limit): name
            for name, expression in join(mutants).items()
        }
        passed = True
        for run in as_completed(runs):
            report(runs[run], run.result())
            passed &= run.result().status == PASSED
        return passed


def run_mutants(
    mutants: Sequence[Mutant], jobs: int, limit: float, full: bool, report: Report
) -> dict[str, MutantOutcome]:
    """Apply each fault to a separate copy, and report results as they become available."""
    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(run_mutant, mutant, limit, full): mutant.name for mutant in mutants}
        for run in as_completed(runs):
            report(runs[run], run.result())
        outcomes = {name: run.result() for run, name in runs.items()}
    return {mutant.name: outcomes[mutant.name] for mutant in mutants}


def run_mutant(mutant: Mutant, limit: float, full: bool) -> MutantOutcome:
    """Apply a fault and run the expected tests; with `full`, then the rest of the quick suite."""
    start = time.monotonic()
    with copied() as tree:
        try:
            source = mutant.apply(tree)
        except ValueError as error:
            return MutantOutcome("does not apply", str(error), 0.0)
        (tree / mutant.file).write_text(source)
        for name, expression in mutant.tests.items():
            found = run_tests(tree, name, expression, limit)
            if found.status != PASSED:
                return found._replace(seconds=time.monotonic() - start)
        if full:
            found = run_tests(tree, None, None, limit)
    return found._replace(seconds=time.monotonic() - start)


def run_tests(tree: Path, name: str | None, expression: str | None, limit: float) -> MutantOutcome:
    """Run the quick tests of one file, or of all, until one fails.

    Args:
        tree: a copy of the repository.
        name: the test file, without `.py`; None = the whole suite.
        expression: pytest's `-k`; None = all.
        limit: timeout in seconds.
    """
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", *OPTIONS]
    try:
        command.append("tests" if name is None else str(find_test_file(tree, name)))
        if name is None:
            command.append(f"--ignore={find_test_file(tree, OWN_TEST)}")
    except ValueError as error:
        return MutantOutcome("has no tests", str(error), 0.0)
    if expression is not None:
        command += ["-k", expression]
    environment = {key: x for key, x in os.environ.items() if key != "PYTEST_ADDOPTS"}
    # The packages of the copy, before the installed ones.
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return MutantOutcome(
            "took too long", f"{name or 'all tests'}: more than {limit:.0f} s", limit
        )
    status = CODES.get(run.returncode, f"pytest exits with {run.returncode}")
    return MutantOutcome(status, _first_failure(run.stdout), time.monotonic() - start)


@contextmanager
def copied() -> Iterator[Path]:
    """Copy the files of the working tree that git does not ignore, changes included."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        yield tree


def _first_failure(output: str) -> str:
    """Return the test that pytest's summary names first, without its file's folder."""
    found = re.search(
        r"^(?:FAILED|ERROR) (?:\S*/)?([\w.:]+(?:\[.*?\](?= - |$))?)", output, re.MULTILINE
    )
    return found[1] if found else ""
