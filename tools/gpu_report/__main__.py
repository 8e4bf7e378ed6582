"""`python -m tools.gpu_report`: run all measurements, and write one JSON and one Markdown file."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mc_core.files import write_atomic

STEPS = Path(__file__).with_name("steps.yaml")
ENVIRONMENT = {
    # Disable preallocation: both frameworks share the GPU memory in one process.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_force_compilation_parallelism=8",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TRITON_CACHE_AUTOTUNING": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Untimed checks need no tuned kernels.
UNTUNED = "--xla_gpu_autotune_level=0"


@dataclass(frozen=True)
class ReportStep:
    """One `mc` command of the report.

    Attributes:
        name: unique name, used for output files.
        title: section heading.
        limit: time limit in seconds.
        command: arguments of `mc`, without `--json` and `--markdown`.
        tiny: a smaller command, to test the report on a CPU.
        together: True for untimed steps, which may run in parallel.
    """

    name: str
    title: str
    limit: float
    command: str
    tiny: str
    together: bool = False


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of a step: `done`, `failed`, `stopped` at its time limit, or `skipped`."""

    status: str
    seconds: float


def main(words: Sequence[str] | None = None) -> int:
    """Run the report, and return the exit code: 0 if all steps succeeded."""
    options = _parse(words)
    steps = [
        step for step in load_steps() if any(fnmatch(step.name, name) for name in options.names)
    ]
    if not steps:
        print(f"no step has one of these names: {' '.join(options.names)}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compile:
        _compile([step for step in steps if not step.together], options)
    end = time.monotonic() + options.budget
    outcomes = _run([step for step in steps if step.together], options, end)
    for step in steps:
        if not step.together:
            outcomes |= _run([step], options, end)
        write_report(options.out, steps, outcomes)
    return 0 if all(found.status == "done" for found in outcomes.values()) else 1


def load_steps() -> list[ReportStep]:
    """Return the steps of `steps.yaml` in their order."""
    return [ReportStep(**values) for values in OmegaConf.to_container(OmegaConf.load(STEPS))]  # type: ignore[union-attr, arg-type]


def write_report(out: Path, steps: Iterable[ReportStep], outcomes: dict[str, StepOutcome]) -> None:
    """Write the results so far as `report.json` and `report.md`.

    Args:
        out: folder with the output files of the steps.
        steps: steps, in the order of the report.
        outcomes: outcomes by step name; missing if a step has not run yet.
    """
    data: dict[str, Any] = {}
    sections = ["# Measured on a GPU", ""]
    for step in steps:
        if not (found := outcomes.get(step.name)):
            continue
        result, page = (out / f"{step.name}.{suffix}" for suffix in ("json", "md"))
        data[step.name] = {"status": found.status, "seconds": round(found.seconds, 1)}
        sections += [f"## {step.title}", ""]
        if found.status != "done":
            sections += [f"`mc {step.command}`: {found.status} after {found.seconds:.0f} s.", ""]
        if page.exists():
            written = f" --json {result} --markdown {page}"
            data[step.name]["result"] = _without_leaves(
                json.loads(result.read_text().replace(written, ""))
            )
            sections.append(page.read_text().replace("## ", "### ", 1).replace(written, ""))
    write_atomic(out / "report.json", json.dumps(data, indent=1).encode())
    write_atomic(out / "report.md", "\n".join(sections).encode())


def _without_leaves(result: dict[str, Any]) -> dict[str, Any]:
    """Drop the entries of single arrays from results of the parity command."""
    if "cases" not in result:
        return result
    keys = ("name", "dtype", "ok")
    cases = [{key: case[key] for key in keys if key in case} for case in result["cases"]]
    return result | {"cases": cases}


def _run(
    steps: Sequence[ReportStep], options: argparse.Namespace, end: float
) -> dict[str, StepOutcome]:
    """Run steps in parallel, and wait for all of them."""
    running, outcomes = {}, {}
    for step in steps:
        limit = min(step.limit, end - time.monotonic())
        if limit < options.least:
            outcomes[step.name] = StepOutcome("skipped", 0.0)
            continue
        running[step.name] = _start(step, options), time.monotonic(), limit
    for name, (process, start, limit) in running.items():
        try:
            code = process.wait(max(0.0, start + limit - time.monotonic()))
            status = "done" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            # A step with files was stopped while its process ended.
            status = "done" if (options.out / f"{name}.md").exists() else "stopped"
        outcomes[name] = StepOutcome(status, time.monotonic() - start)
        print(f"{status:9} {name} {outcomes[name].seconds:.0f} s", flush=True)
    return outcomes


def _compile(steps: Sequence[ReportStep], options: argparse.Namespace) -> None:
    """Run all steps once in parallel, to fill the compilation caches."""
    once = [replace(step, command=f"{step.command} --runs 1") for step in steps]
    limit = time.monotonic() + options.compile
    running = [_start(step, options) for step in once]
    for process in running:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(step: ReportStep, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    files = {suffix: options.out / f"{step.name}.{suffix}" for suffix in ("json", "md", "log")}
    for suffix in ("json", "md"):
        files[suffix].unlink(missing_ok=True)
    words = (step.tiny if options.tiny else step.command).split()
    words += ["--json", str(files["json"]), "--markdown", str(files["md"])]
    compiled = Path(tempfile.gettempdir(), "mc-gpu-report-compiled")
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    if options.tiny:
        environment = {"JAX_PLATFORMS": "cpu"}
    elif step.together:
        environment["XLA_FLAGS"] += f" {UNTUNED}"
    with open(files["log"], "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "train", *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_report", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], help="steps or patterns; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    parser.add_argument(
        "--budget", type=float, default=720, help="seconds for all steps (default: 720)"
    )
    parser.add_argument(
        "--compile",
        type=float,
        default=0,
        help="additional seconds in which all timed steps first compile in parallel; kernels "
        "are then tuned under load (default: 0, each step compiles by itself)",
    )
    parser.add_argument(
        "--least", type=float, default=15, help="least remaining seconds to start a step"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
