"""`python -m tools.gpu_report`: run all measurements, and write one JSON and one Markdown file."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tools.gpu_report.environment import ROOT, EnvironmentFailure, make_environment
from tools.gpu_report.page import Report
from tools.gpu_report.steps import ReportStep, Settings, load_steps, run_steps

MACHINE = "import json; from parity.environment import machine; print(json.dumps(machine()))"


def main(words: Sequence[str] | None = None) -> int:
    """Run the report, and return the exit code: 0 if all steps succeeded."""
    end = time.monotonic()
    options = _parse(words)
    end += options.budget
    steps = _selected(options)
    if not steps:
        print(f"no step has one of these names: {' '.join(options.names)}", file=sys.stderr)
        return 2
    folder = (options.out / "steps").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = options.python
    if python is None:
        log = folder / "environment.log"
        log.unlink(missing_ok=True)
        limit = min(options.install, end - time.monotonic())
        try:
            python = make_environment(options.environment, log, limit, cuda=not options.tiny)
        except EnvironmentFailure as failure:
            print(f"{options.environment}: {failure}: see {log}", file=sys.stderr)
            return 1
    # Not resolved: the Python of a venv is a link to that of the system.
    settings = Settings(
        Path(os.path.abspath(python)), folder, options.tiny, options.patience, options.least
    )
    report = Report(options.out, steps, settings, _machine(settings, steps[0]))
    report.write()
    checks = [step for step in steps if step.together]
    timed = [step for step in steps if not step.together]
    slots = max(1, (os.cpu_count() or 1) // 2)
    run_steps(checks, settings, end, report.add, slots)
    if options.compile:
        _compile(timed, settings, min(options.compile, end - time.monotonic()), slots)
    run_steps(timed, settings, end, report.add)
    return 0 if all(found.status == "done" for found in report.outcomes.values()) else 1


def _selected(options: argparse.Namespace) -> list[ReportStep]:
    """Return the steps to run."""
    return [
        step
        for step in load_steps()
        if any(fnmatch(step.name, name) for name in options.names)
        and (step.tiny or not options.tiny)
    ]


def _machine(settings: Settings, step: ReportStep) -> dict[str, Any]:
    """Return the name of the device, and the versions in the environment."""
    try:
        done = subprocess.run(
            [str(settings.python), "-c", MACHINE],
            cwd=ROOT,
            env=settings.environment(step),
            capture_output=True,
            text=True,
            timeout=120 * settings.patience,
        )
    except subprocess.TimeoutExpired:
        return {}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        print(done.stderr, file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _compile(steps: Sequence[ReportStep], settings: Settings, limit: float, slots: int) -> None:
    """Run the benchmarks once, several at a time, to fill the compilation caches.

    Kernels are then tuned under load.
    """
    once = [
        replace(step, command=f"{step.command} --runs 1", tiny=f"{step.tiny} --runs 1")
        for step in steps
        if not step.trains
    ]
    run_steps(once, settings, time.monotonic() + limit, lambda *_: None, slots)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_report", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="steps or patterns; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    parser.add_argument("--budget", default=720.0, help="for everything (720)", **seconds)
    parser.add_argument("--install", default=300.0, help="for the environment (300)", **seconds)
    parser.add_argument(
        "--compile",
        default=None,
        help="in which all timed steps first compile in parallel (150; 0 with --tiny)",
        **seconds,
    )
    parser.add_argument("--least", default=15.0, help="that a step needs to start (15)", **seconds)
    parser.add_argument(
        "--patience", type=float, default=1.0, help="factor of the time limits of steps (1)"
    )
    parser.add_argument(
        "--environment", type=Path, default=Path(".venv-gpu"), help="folder of the venv to make"
    )
    parser.add_argument("--python", type=Path, help="interpreter to use in place of a new venv")
    options = parser.parse_args(words)
    if options.compile is None:
        options.compile = 0.0 if options.tiny else 150.0
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the report has the finished steps", file=sys.stderr)
        sys.exit(130)
