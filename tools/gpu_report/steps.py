"""The steps of the report, and the processes that run them."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tools.gpu_report.environment import ROOT, last_line

FILE = Path(__file__).with_name("steps.toml")
ENVIRONMENT = {
    # Disable preallocation: both frameworks, and several processes, share the GPU memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_force_compilation_parallelism=8",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir(), "mc-gpu-report-compiled")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TRITON_CACHE_AUTOTUNING": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Untimed checks need no tuned kernels.
UNTUNED = "--xla_gpu_autotune_level=0"
POLL = 0.05  # seconds


@dataclass(frozen=True)
class ReportStep:
    """One `mc` command of the report.

    Attributes:
        name: unique name, used for output files.
        title: section heading.
        limit: time limit in seconds.
        command: arguments of `mc`, without those of the output files.
        tiny: a smaller command, to test the report on a CPU; "" if it is not part of the test.
        together: True for untimed steps, which may run in parallel.
    """

    name: str
    title: str
    limit: float
    command: str
    tiny: str
    together: bool = False

    @property
    def trains(self) -> bool:
        """True for `mc train`, whose curves are the result."""
        return self.command.startswith("train ")


@dataclass(frozen=True)
class StepOutcome:
    """Outcome of a step: `done`, `failed`, `stopped` at its time limit, or `skipped`.

    Attributes:
        status: one of these words.
        seconds: time that it took.
        reason: last line of the log of a step that failed.
    """

    status: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Settings:
    """How the steps of a report run.

    Attributes:
        python: interpreter with both frameworks.
        folder: folder of the output files of the steps.
        tiny: run the small commands on the CPU.
        patience: factor of the time limits.
        least: least remaining seconds to start a step.
    """

    python: Path
    folder: Path
    tiny: bool = False
    patience: float = 1.0
    least: float = 15.0

    def command(self, step: ReportStep) -> list[str]:
        """Return the command line of a step."""
        words = shlex.split(step.tiny if self.tiny else step.command)
        if step.trains:
            words.append(f"run.directory={self.folder / step.name}")
        else:
            out = str(self.folder / step.name)
            words += ["--json", f"{out}.json", "--markdown", f"{out}.md"]
        return [str(self.python), "-m", "train", *words]

    def environment(self, step: ReportStep) -> dict[str, str]:
        """Return the environment of a step's process."""
        found = dict(ENVIRONMENT)
        if self.tiny:
            found = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        elif step.together:
            found["XLA_FLAGS"] += f" {UNTUNED}"
        return os.environ | found | {"PYTHONPATH": str(ROOT)}


def load_steps(path: Path = FILE) -> list[ReportStep]:
    """Return the steps in their order, with all combinations of `each`."""
    found = []
    for entry in tomllib.loads(path.read_text())["step"]:
        values: dict[str, list[Any]] = entry.pop("each", {})
        for number, combination in enumerate(product(*values.values())):
            names = dict(zip(values, combination, strict=True))
            texts = {key: x.format(**names) for key, x in entry.items() if isinstance(x, str)}
            found.append(ReportStep(**(entry | texts | ({"tiny": ""} if number else {}))))
    return found


def run_steps(
    steps: Iterable[ReportStep],
    settings: Settings,
    end: float,
    record: Callable[[ReportStep, StepOutcome], None],
    slots: int = 1,
) -> None:
    """Run steps, `slots` at a time, and record each outcome as soon as it is known.

    Args:
        steps: steps in the order in which they start.
        settings: how they run.
        end: time of the monotonic clock at which every step has stopped.
        record: receives the outcomes.
        slots: number of steps that run at the same time.
    """
    waiting, running = list(steps), dict[ReportStep, tuple[subprocess.Popen[bytes], float, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                step = waiting.pop(0)
                limit = min(step.limit * settings.patience, end - time.monotonic())
                if limit < settings.least:
                    record(step, StepOutcome("skipped", 0.0))
                    continue
                running[step] = start(step, settings), time.monotonic(), limit
            for step, (process, began, limit) in list(running.items()):
                if (outcome := _outcome(step, settings, process, began, limit)) is not None:
                    del running[step]
                    record(step, outcome)
            time.sleep(POLL)
    finally:
        for process, *_ in running.values():
            kill(process)


def _outcome(
    step: ReportStep,
    settings: Settings,
    process: subprocess.Popen[bytes],
    began: float,
    limit: float,
) -> StepOutcome | None:
    """Return the outcome of a step, which is stopped at its limit; None while it runs."""
    seconds = time.monotonic() - began
    code = process.poll()
    if code is None and seconds < limit:
        return None
    if code is None:
        kill(process)
        # A step with files was stopped while its process ended.
        written = (settings.folder / f"{step.name}.md").exists()
        return StepOutcome("done" if written else "stopped", seconds)
    if code == 0:
        return StepOutcome("done", seconds)
    return StepOutcome("failed", seconds, last_line(settings.folder / f"{step.name}.log"))


def start(step: ReportStep, settings: Settings) -> subprocess.Popen[bytes]:
    """Start the process of a step, without output files of an earlier run."""
    shutil.rmtree(settings.folder / step.name, ignore_errors=True)
    for suffix in ("json", "md"):
        (settings.folder / f"{step.name}.{suffix}").unlink(missing_ok=True)
    with open(settings.folder / f"{step.name}.log", "wb") as log:
        return subprocess.Popen(
            settings.command(step),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=settings.environment(step),
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a step's process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
