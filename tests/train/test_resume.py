"""Interrupted runs, and runs that cannot write, resume bit-exactly."""

import gc
import json
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from helpers.dropout_model import Dropping
from helpers.interruptions import full_disk, quiet, train_until
from helpers.tiny_run import COMMAND, mc, write_config
from mc_core.errors import UserError
from train.checkpoint import Checkpoints, last_step
from train.config import load_config
from train.data.corpus import load_corpus
from train.data.windows import make_batches
from train.evaluation.run_report import load_report
from train.metrics import read_rows
from train.step import build
from train.storage import BackgroundErrors


def start(config: Path, *words: str) -> subprocess.Popen:
    command = [*COMMAND, "train", str(config), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def final(config: Path, *words: str):
    """Return all arrays of the last checkpoint, its step, and the position of the data."""
    loaded = load_config(config, words)
    _, like, _ = build(loaded)
    corpus = load_corpus(loaded.data, 256)
    batches = make_batches(corpus.train, loaded.data, loaded.run)
    with Checkpoints(Path(loaded.run.directory)) as checkpoints:
        step = checkpoints.latest()
        state = checkpoints.restore(step, like, batches)
    arrays = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): array for path, array in arrays}, step, batches.get_state()


def assert_same_end(config: Path, *words: str) -> None:
    whole, whole_step, whole_position = final(config, *words, WHOLE(config))
    parts, parts_step, parts_position = final(config, *words)
    assert parts_step == whole_step
    assert parts_position == whole_position
    assert parts.keys() == whole.keys()
    for name, array in whole.items():
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            array, parts[name] = jax.random.key_data(array), jax.random.key_data(parts[name])
        assert np.array_equal(array, parts[name]), name


def WHOLE(config: Path) -> str:
    return f"run.directory={config.parent / 'runs' / 'whole'}"


def checkpoint_begins(run: Path) -> bool:
    return any(run.glob("checkpoints/*tmp*"))


def kill_when(process: subprocess.Popen, condition) -> None:
    """Send SIGKILL as soon as `condition` is true; fail if the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_sigkill_resumes_bit_exactly(tmp_path, no_pictures):
    """A run that is killed while it writes a checkpoint resumes with the same result."""
    words = ("run.steps=60", "run.save_every=10", "run.log_every=1", "run.validate_every=0")
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"

    def rows() -> int:
        return len(read_rows(run))

    process = start(config, *words)
    kill_when(process, lambda: last_step(run) >= 10 and checkpoint_begins(run))
    assert 10 <= rows() < 60

    assert "resuming from step" in quiet(config, *words)
    quiet(config, *words, WHOLE(config))
    assert_same_end(config, *words)
    assert [row["step"] for row in read_rows(run)] == list(range(1, 61))
    assert [row["loss"] for row in read_rows(run)] == [
        row["loss"] for row in read_rows(tmp_path / "runs" / "whole")
    ]


KILLS = 20


@pytest.mark.slow
def test_sigkill_at_random_times_resumes(tmp_path):
    """A run that is killed 20 times, at random times, has the same result.

    Batches are read ahead, and steps are dispatched before the previous ones end. Every third step
    starts a save, and many kills happen during one.
    """
    words = ("run.steps=1000", "run.save_every=3", "run.log_every=7", "run.keep=1")
    words = (*words, "run.validate_every=0")
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    start(config, *words, WHOLE(config)).communicate(timeout=600)
    times = [row["time"] for row in read_rows(tmp_path / "runs" / "whole")]
    longest = (times[-1] - times[0]) / (2 * KILLS)  # so that the run does not end before
    moments = random.Random(0)
    steps = []
    for _ in range(KILLS):
        began = time.time()
        process = start(config, *words)
        while not any(row["time"] > began for row in read_rows(run)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps.append(last_step(run))
    assert steps == sorted(steps)
    assert 0 < steps[-1] < 1000
    _, err = start(config, *words).communicate(timeout=600)
    assert err == b""
    assert_same_end(config, *words)


@pytest.mark.slow
def test_unfinished_checkpoint_of_killed_run_is_removed(tmp_path, caplog, no_pictures):
    """Orbax would warn when the same step is saved again."""
    run = tmp_path / "runs" / "tiny"
    config = write_config(tmp_path)
    quiet(config, "run.steps=8")
    unfinished = run / "checkpoints" / "12.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(run) as reader:
        assert reader.latest() == 8
    assert unfinished.exists(), "another process may be writing it"
    caplog.clear()
    quiet(config, "run.steps=12")
    assert not unfinished.exists()
    assert "temporary directory" not in caplog.text


@pytest.mark.slow
def test_random_streams_resume(tmp_path, monkeypatch, no_pictures):
    """A model with dropout draws the same numbers after a restart."""
    monkeypatch.setattr("train.step.LanguageModel", Dropping)
    config = write_config(tmp_path)
    quiet(config, WHOLE(config))
    train_until(8, config, monkeypatch)
    quiet(config)
    assert_same_end(config)
    arrays, _, _ = final(config)
    assert sum(".rest" in name for name in arrays) == 2


@pytest.mark.slow
def test_full_disk_keeps_checkpoints(tmp_path, monkeypatch, no_pictures):
    """The previous checkpoint is unchanged, and the run resumes bit-exactly once there is space."""
    config = write_config(tmp_path)
    quiet(config, "run.keep=1", WHOLE(config))
    save = Checkpoints.save

    def save_on_a_full_disk(self, step, *rest):
        with full_disk(4000 if step == 8 else 2**40):
            save(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_on_a_full_disk)
        with pytest.raises(UserError) as error:
            quiet(config, "run.keep=1")
    assert "cannot save the checkpoint of step 8 (File too large)" in str(error.value)
    assert "it resumes from step 4" in str(error.value)
    with Checkpoints(tmp_path / "runs" / "tiny") as checkpoints:
        assert checkpoints.latest() == 4
    quiet(config, "run.keep=1")
    assert_same_end(config)


@contextmanager
def disk_fills(monkeypatch, step: int):
    """Fill the disk while the files of the checkpoint of a step are written."""
    save, limits = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_and_fill(self, at, *rest):
        if at == step:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        save(self, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_fill)
        patch.setattr("train.checkpoint.check_disk_space", lambda *_: None)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("step", [8, 12])
def test_disk_that_fills_during_a_save(tmp_path, monkeypatch, capfd, no_pictures, step):
    """One line and exit code 2, also from the last save; the run resumes bit-exactly."""
    config = write_config(tmp_path)
    words = ("run.keep=1", "run.validate_every=0")
    with disk_fills(monkeypatch, step):
        assert mc(monkeypatch, "train", config, *words) == 2
    err = capfd.readouterr().err
    assert f"cannot save the checkpoint of step {step} (" in err
    assert f"it resumes from step {step - 4}\n" in err
    assert err.count("\n") == 1
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.glob("*[0-9]")] == [str(step - 4)]
    if step == 8:
        quiet(config, *words)
        quiet(config, *words, WHOLE(config))
        assert_same_end(config, *words)


def test_full_disk_is_a_one_line_error(tmp_path, monkeypatch, capfd):
    config = write_config(tmp_path)
    with full_disk(4000):
        assert mc(monkeypatch, "train", config) == 2
    err = capfd.readouterr().err
    assert "free disk space" in err
    assert err.count("\n") == 1


def test_unwritable_curves_are_a_one_line_error(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    with full_disk(150):
        assert mc(monkeypatch, "train", config, "run.log_every=1") == 2
    err = capsys.readouterr().err
    assert "metrics.jsonl: File too large" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_incomplete_row_is_dropped(tmp_path, monkeypatch, no_pictures):
    config = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    train_until(8, config, monkeypatch)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    quiet(config)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [row["step"] for row in map(json.loads, lines) if "loss" in row]
    assert losses == [3, 6, 9, 12]
    assert len(list((run / "tensorboard").iterdir())) == 1


@pytest.mark.slow
def test_missing_report_of_finished_run_is_written(tmp_path, monkeypatch):
    """A run that is killed after the last checkpoint writes its report without training."""
    config = write_config(tmp_path)
    quiet(config)
    run = tmp_path / "runs" / "tiny"
    report = load_report(run)
    for name in ("report.json", "curves.png", "router.png"):
        (run / name).unlink()
    monkeypatch.setattr(Checkpoints, "save", None)
    quiet(config)
    assert load_report(run) == report
    assert {"report.json", "curves.png", "router.png"} <= {path.name for path in run.iterdir()}


def test_old_checkpoints_are_deleted_and_the_latest_resumes(tmp_path, no_pictures):
    config = write_config(tmp_path)
    quiet(config, "run.save_every=2", "run.keep=3")
    kept = {int(path.name) for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()}
    assert kept == {8, 10, 12}
    assert "resuming from step 12" in quiet(config, "run.steps=14")


async def never_started() -> None:
    raise AssertionError


def failing_write() -> None:
    waiting: list = [never_started()]
    try:
        raise OSError("No space left on device")
    except OSError as error:
        waiting.append(error)  # a cycle, as in Orbax
        raise


def test_late_reports_of_a_failed_checkpoint_are_dropped(monkeypatch):
    """Threads of TensorStore may report after the context; other errors are shown."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: reported.append(str(error.exc_value)))

    def report(text: str) -> None:
        error = SimpleNamespace(exc_value=RuntimeError(text))
        thread = Thread(target=lambda: sys.unraisablehook(error))
        thread.start()
        thread.join()

    with BackgroundErrors():
        pass
    report("Event loop is closed")
    assert reported == ["Event loop is closed"]
    with BackgroundErrors() as errors:
        errors.found.append(OSError())
    report("Event loop is closed")
    report("another error")
    assert reported == ["Event loop is closed", "another error"]


def test_writes_that_never_started_are_freed_without_a_warning():
    """Frames of an error refer to them; outside of the context, warnings are errors."""
    with BackgroundErrors() as errors:
        try:
            failing_write()
        except OSError as error:
            errors.found.append(error)
    errors.found.clear()
    gc.collect()
