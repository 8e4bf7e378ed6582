"""Training with two processes of four devices each, over the loopback interface."""

import io
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from rich.console import Console

from helpers.tiny_run import COMMAND, TINY, write_config
from train.checkpoint import last_step, load_run
from train.config import load_config
from train.data.share import share_rows
from train.loop import train
from train.metrics import read_rows
from train.step import split

RUN = {"steps": 20, "batch_size": 8, "log_every": 1, "save_every": 3, "validate_every": 0}


def start(config: Path, *words: str) -> list[subprocess.Popen]:
    """Start the command in two processes, with outputs in the folder of the configuration."""
    folder = config.parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = []
    for number in range(2):
        own = {"JAX_PROCESS_ID": str(number)}
        out, err = folder / f"out{number}", folder / f"err{number}"
        with out.open("w") as stdout, err.open("w") as stderr:
            words_of_all = [*COMMAND, "train", str(config), *words]
            environment = os.environ | shared | own
            process = subprocess.Popen(words_of_all, env=environment, stdout=stdout, stderr=stderr)
        processes.append(process)
    return processes


def outputs(folder: Path) -> list[str]:
    """Return stdout and stderr of both processes, without the lines of XLA's own libraries."""
    texts = [(folder / f"{name}{n}").read_text() for name in ("out", "err") for n in range(2)]
    # Lines of Gloo's threads are mixed: parts of a line, or an empty one, may stand alone.
    library = re.compile(r"(?m)^(?:.*(?:\[Gloo\]|peer ranks|preemption_notifier).*|\d*)\n")
    return [library.sub("", text) for text in texts]


def messages(text: str) -> str:
    """Return the lines of the command, without those of JAX and Orbax about the signal."""
    return "".join(line for line in text.splitlines(True) if line.startswith("mc: "))


def wait_for(condition, processes, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        for process in processes:
            assert process.poll() is None, process.args
        time.sleep(0.05)


def parameters(run) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(split(load_run(run)[1])[1])]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    # Small steps, because large ones enlarge differences of rounding.
    optimizer = TINY["optimizer"] | {"learning_rate": 1e-4, "eps": 1e-3}
    run = TINY["run"] | RUN | {"directory": str(tmp_path / "runs" / "tiny")}
    return write_config(tmp_path, run=run, optimizer=optimizer)


def train_until(
    number: signal.Signals, config: Path, *words: str, when: Callable[[Path], Any]
) -> list[int]:
    """Train with two processes, send a signal to the second one, and return the exit codes."""
    run, processes = config.parent / "runs" / "tiny", start(config, *words)
    try:
        wait_for(lambda: when(run), processes)
        processes[1].send_signal(number)
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_resumes(
    config: Path, *words: str, steps: int = RUN["steps"], atol: float = 1e-6
) -> list[str]:
    """Resume with two processes, compare with a single one, and return the outputs."""
    run, processes = config.parent / "runs" / "tiny", start(config, *words)
    try:
        codes = [process.wait(timeout=480) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = outputs(config.parent)
    assert codes == [0, 0], texts
    assert texts[1:] == ["", "", ""]
    steps_of_rows = [row["step"] for row in read_rows(run) if "loss" in row]
    assert steps_of_rows == list(range(1, steps + 1))
    alone = config.parent / "alone"
    train(load_config(config, [*words, f"run.directory={alone}"]), Console(file=io.StringIO()))
    for a, b in zip(parameters(run), parameters(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)
    return texts


def is_saved(run: Path) -> bool:
    return any(path.name.isdecimal() for path in (run / "checkpoints").glob("*"))


@pytest.mark.usefixtures("no_pictures")
def test_run_resumes_after_sigkill_of_one_process(config):
    """Killed in mid-run; the resumed run equals that of one process with eight devices.

    The other process, which waits for the killed one, is killed as well, as by most clusters.
    """
    run, processes = config.parent / "runs" / "tiny", start(config, "run.mesh.data=8")
    try:
        wait_for(lambda: is_saved(run), processes)
    finally:
        for process in reversed(processes):
            process.kill()
        codes = [process.wait() for process in processes]
    assert codes[1] == -signal.SIGKILL, outputs(config.parent)
    # The other process may abort at the lost connection before it is killed.
    assert codes[0] in (-signal.SIGKILL, -signal.SIGABRT), outputs(config.parent)
    assert len(read_rows(run)) < RUN["steps"], "ended too early"
    assert "resuming from step" in assert_resumes(config, "run.mesh.data=8")[0]


@pytest.mark.slow
def test_sigkill_of_one_process_ends_the_other(config):
    """JAX ends it, when the killed process has not answered for about 100 s."""
    codes = train_until(signal.SIGKILL, config, "run.mesh.data=8", when=is_saved)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_terminated_process_saves_all_at_the_same_step(config):
    """SIGTERM of one process ends both with one line; the run resumes from that step."""
    words = ["run.mesh.data=8", "run.steps=60", "run.save_every=50"]
    codes = train_until(signal.SIGTERM, config, *words, when=lambda run: len(read_rows(run)) > 3)
    assert codes == [143, 143]
    errors = outputs(config.parent)[2:]
    assert errors[0] == errors[1]
    assert errors[0].count("\n") == 1
    step = int(re.search(r"from step (\d+)\n", errors[0])[1])
    assert step % 50, "the signal came too late"
    # Differences of rounding grow with the number of steps.
    out = assert_resumes(config, *words, steps=60, atol=1e-4)[0]
    assert f"resuming from step {step} of 60" in out


@pytest.mark.slow
def test_sigterm_of_one_process_stops_all_after_the_same_step(tmp_path):
    """The step is saved, in the background, before both end."""
    run = tmp_path / "runs" / "tiny"
    sections = {"run": TINY["run"] | RUN | {"directory": str(run), "steps": 5000}}
    config = write_config(tmp_path, **sections)
    processes = start(config, "run.mesh.data=8", "run.save_every=5000")
    try:
        wait_for(lambda: len(read_rows(run)) > 3, processes)
        processes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    _, _, *errors = map(messages, outputs(tmp_path))
    step = last_step(run)
    assert 3 < step < 5000
    message = f"mc: interrupted: the same command resumes {run} from step {step}\n"
    assert (codes, errors) == ([143, 143], [message, message])
    assert read_rows(run)[-1]["step"] == step
    assert load_run(run)[2] == step


@pytest.mark.slow
def test_nan_stops_all_processes_at_the_same_step(tmp_path):
    run = tmp_path / "runs" / "tiny"
    config = write_config(tmp_path, run=TINY["run"] | RUN | {"directory": str(run)})
    words = ["run.mesh.data=8", "run.log_every=7", "run.save_every=7", "optimizer.warmup_steps=0"]
    words += ["optimizer.learning_rate=1e30", "optimizer.weight_decay=0"]
    processes = start(config, *words)
    try:
        codes = [process.wait(timeout=480) for process in processes]
    finally:
        for process in processes:
            process.kill()
    *_, first, second = map(messages, outputs(tmp_path))
    assert codes == [1, 1]
    assert first == second
    assert re.fullmatch(
        r"mc: step 2: .* is not finite .*; the last good checkpoint is step 0\n", first
    )
    assert read_rows(run) == []


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_are_the_rows_of_the_global_batches(count):
    """Order and content of the global batches do not depend on the number of processes."""
    run = load_run_config(batch_size=4, accumulation=3)
    dataset = grain.MapDataset.source(range(10)).shuffle(seed=3).repeat(4)
    whole = np.array([dataset[i] for i in range(36)]).reshape(3, 3, 4)
    parts = []
    for process in range(count):
        rows = [*range(process * 4 // count, (process + 1) * 4 // count)]
        share, shape = share_rows(dataset, run, rows if count > 1 else None)
        assert shape == (3, 4 // count)
        flat = [share[i] for i in range(3 * shape[0] * shape[1])]
        parts.append(np.array(flat).reshape(3, *shape))
    np.testing.assert_array_equal(np.concatenate(parts, axis=2), whole)


def load_run_config(**keys: int):
    from train.config import RunConfig

    return RunConfig(steps=1, **keys)
