"""Locks of run directories: one writer at a time."""

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from helpers.interruptions import Stop
from helpers.sweeps import write
from helpers.tiny_run import mc, write_config
from train.checkpoint import last_step, load_run
from train.config import load_config
from train.faults import no_faults
from train.loop import train
from train.metrics import Curves
from train.step import Metrics, build

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
HOLD = """
import sys
from pathlib import Path
from train.lock import Lock
lock = Lock.of_run(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def lock_of(directory: Path):
    from train.lock import Lock

    return closing(Lock.of_run(directory))


def refused(directory: Path) -> str:
    """Return the error message of a failed lock."""
    from train.lock import LockedError

    with lock_of(directory) as lock, pytest.raises(LockedError) as error:
        lock.acquire()
    return str(error.value)


def leave_record(directory: Path, pid: int, host: str = HOST) -> Path:
    """Write the record of an owner without a file lock."""
    directory.mkdir(exist_ok=True)
    file = directory / ".lock"
    file.write_text(json.dumps({"pid": pid, "host": host, "since": "2026-01-02 03:04:05"}))
    return file


def test_lock_excludes_second_trainer_but_not_readers(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    words = ["run.log_every=1", "run.save_every=1"]
    run = tmp_path / "runs" / "tiny"
    codes, steps = [], []

    def interfere(curves, step, **values):
        if step == 2:
            codes.append(mc(monkeypatch, "train", path, *words))
            while last_step(run) < 1:  # written in the background
                time.sleep(0.01)
            steps.append(load_run(run)[2])
            raise Stop

    graphdef, state, _ = build(load_config(path, words))
    metrics = Metrics(np.ones(()), np.ones(()), no_faults())
    fake = (graphdef, state, lambda state, batch: (state, metrics))
    monkeypatch.setattr("train.loop.build", lambda config, mesh: fake)
    monkeypatch.setattr(Curves, "write", interfere)
    with pytest.raises(Stop):
        train(load_config(path, words), Console(file=io.StringIO()))
    assert codes == [2]
    assert steps == [1]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mc: {run}: in use by process {os.getpid()} on {HOST} since 2")
    assert err.endswith(": wait for it, or set another run.directory\n")
    assert err.count("\n") == 1
    assert not (run / ".lock").exists()


def test_lock_ends_with_its_process(tmp_path):
    """Also if the process is killed and its record remains. The error states a live owner."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    owner = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "held\n"
        assert f"{tmp_path}: in use by process {owner.pid} on {HOST} since " in refused(tmp_path)
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == owner.pid
    with lock_of(tmp_path) as lock:
        lock.acquire()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_reused_process_id_does_not_hold_the_lock(tmp_path):
    leave_record(tmp_path, os.getpid())
    with lock_of(tmp_path) as lock:
        lock.acquire()
        assert f"process {os.getpid()}" in refused(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": "x", "host": 1}'])
def test_lock_file_without_record_is_free(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with lock_of(tmp_path) as lock:
        lock.acquire()


def test_record_of_another_host_holds_until_deleted(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    file = leave_record(run, os.getpid(), "elsewhere")
    before = file.read_bytes()
    assert mc(monkeypatch, "train", path) == 2
    assert capsys.readouterr().err == (
        f"mc: {run}: in use by process {os.getpid()} on elsewhere since 2026-01-02 03:04:05: "
        f"if that process has ended, delete {file}\n"
    )
    assert file.read_bytes() == before
    file.unlink()
    with lock_of(run) as lock:
        lock.acquire()


def test_record_decides_without_file_system_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("train.lock.fcntl.flock", flock)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave_record(tmp_path, ended.pid)
    with lock_of(tmp_path) as lock:
        lock.acquire()
        assert f"process {os.getpid()} on {HOST}" in refused(tmp_path)
        assert (tmp_path / ".lock").exists()


def test_lock_file_deleted_after_opening_is_ignored(tmp_path, monkeypatch):
    from train import lock as module

    try_lock, deleted = module._try_lock, []

    def delete_first(file):
        if not deleted:
            deleted.append((tmp_path / ".lock").unlink())
        return try_lock(file)

    monkeypatch.setattr(module, "_try_lock", delete_first)
    with lock_of(tmp_path) as lock:
        lock.acquire()
        assert deleted
        assert f"process {os.getpid()}" in refused(tmp_path)


def test_read_only_directory_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("train.lock.os.access", lambda path, mode: False)
    with lock_of(tmp_path) as lock:
        lock.acquire()
        assert [*tmp_path.iterdir()] == []


def test_refused_run_creates_no_directory(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    assert mc(monkeypatch, "train", path, "run.init_from=nowhere") == 2
    assert "run.init_from: nowhere: no checkpoint found" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny").exists()


def test_sweep_and_trainer_exclude_each_other(tmp_path, monkeypatch, capsys):
    """The sweep locks a run from `take` until `add`."""
    from train.sweeps.plan import SweepPlan
    from train.sweeps.results import Results
    from train.sweeps.sweep_config import load_sweep, make_runs

    config = load_sweep(write(tmp_path))
    with SweepPlan(config, make_runs(config), Results(Path(config.directory))) as plan:
        run = plan.take()
        directory = run.config.run.directory
        base = tmp_path / "base.yaml"
        assert mc(monkeypatch, "train", base, f"run.directory={json.dumps(directory)}") == 2
        assert f"{directory}: in use by process {os.getpid()}" in capsys.readouterr().err
        assert plan.take() is None
    with lock_of(Path(directory)) as lock:
        lock.acquire()
        with SweepPlan(config, make_runs(config), Results(Path(config.directory))) as plan:
            assert plan.take() is None
            assert f"{directory}: in use by process {os.getpid()}" in str(plan.blocked)
