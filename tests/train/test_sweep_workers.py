"""`mc sweep --jobs`: equal results, no repeated runs, no orphaned processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import pytest

from helpers.sweep_worker import count_devices, look_around, wait_for
from helpers.sweeps import Trained, write
from helpers.tiny_run import mc
from mc_core.errors import UserError
from parity.environment import cores
from train.lock import Lock
from train.sweeps.plan import SweepPlan
from train.sweeps.results import Results, key_of, read_results
from train.sweeps.sweep_config import Run, load_sweep, make_runs
from train.sweeps.workers import Workers, _no_interrupt, one_thread, shares

ROOT = Path(__file__).parents[2]
two_cores = pytest.mark.skipif(len(cores()) < 2, reason="two jobs need two cores")


def runs_named(tmp_path, *names):
    (run,) = make_runs(load_sweep(write(tmp_path)))["base"]
    return [Run(f"x={name}", {}, 0, 0.1, run.config, None) for name in names]


def collect(workers, runs):
    found = []
    for run in runs:
        workers.start(run)
    while workers.busy:
        found.extend(workers.results())
    return found


@two_cores
def test_workers_have_disjoint_cores(tmp_path):
    with one_thread(), Workers(2, look_around) as workers:
        found = collect(workers, runs_named(tmp_path, *(f"meets{i}" for i in range(4))))
    assert sorted(row["row"] for row in found) == [f"x=meets{i}" for i in range(4)]
    of_worker = {row["pid"]: row["cores"] for row in found}
    assert os.getpid() not in of_worker
    assert len(of_worker) == 2
    assert {row["threads"] for row in found} == {"1"}
    assert sorted(chain(*of_worker.values())) == cores()


@pytest.mark.slow
@two_cores
def test_worker_has_the_devices_of_its_runs(tmp_path, monkeypatch):
    """A worker initializes JAX independently of its parent."""
    monkeypatch.setattr("train.sweeps.sweep.do", count_devices)
    path = write(tmp_path, rows=[{"run.mesh.data": 1}, {"run.mesh.data": 2}])
    assert mc(monkeypatch, "sweep", path, "--jobs", 2) == 0
    assert [row["error"] for row in read_results(tmp_path / "sweep")] == ["2 devices"] * 2


def test_core_shares_partition_all_cores(monkeypatch):
    monkeypatch.setattr("train.sweeps.workers.cores", lambda: [0, 1, 4, 5, 6, 7, 9])
    assert shares(1) == [{0, 1, 4, 5, 6, 7, 9}]
    assert shares(3) == [{0, 1}, {4, 5}, {6, 7, 9}]
    assert all(shares(7))


def test_worker_sets_cores_before_importing_jax():
    code = "import sys, train.sweeps.workers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@two_cores
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user", "no space"),
        ("bug", "x=bug rate=0.1 seed=0: ZeroDivisionError: no space: use --jobs 1 for"),
        ("dies", "jobs = 2: a worker died"),
    ],
)
def test_worker_error_is_one_line_after_finished_runs(tmp_path, name, message):
    good, bad = runs_named(tmp_path, "good", name)
    found = []

    def both():
        with Workers(2, look_around) as workers:
            for run in (good, bad):
                workers.start(run)
                for result in workers.results():
                    found.append(result)

    with pytest.raises(UserError, match=message):
        both()
    assert [row["row"] for row in found] == ["x=good"]


@pytest.mark.parametrize("jobs", [0, -1, 10_000])
def test_jobs_out_of_range_are_refused(tmp_path, monkeypatch, capsys, jobs):
    path = write(tmp_path)
    assert mc(monkeypatch, "sweep", path, "--jobs", jobs) == 2
    err = capsys.readouterr().err
    assert err == f"mc: jobs = {jobs}: must be in [1, {len(cores())}], the number of cores\n"
    assert not (tmp_path / "sweep").exists()


def plan_of(tmp_path, **keys) -> SweepPlan:
    config = load_sweep(write(tmp_path, **keys))
    return SweepPlan(config, make_runs(config), Results(Path(config.directory)))


def result_of(run: Run, accuracy: float) -> dict:
    return {
        "row": run.row, "seed": run.seed, "rate": run.rate, "accuracy": accuracy, "loss": 1.0,
        "fingerprint": run.fingerprint,
    }  # fmt: skip


def test_other_seeds_start_after_all_rates(tmp_path):
    keys = {"vary": {"model.layer.d_model": [8, 16]}, "rates": [0.1, 0.2], "seeds": [0, 1]}
    with plan_of(tmp_path, **keys) as plan:
        taken = [plan.take() for _ in range(4)]
        assert [run.key for run in taken] == [
            ("d_model=8", 0, 0.1), ("d_model=8", 0, 0.2),
            ("d_model=16", 0, 0.1), ("d_model=16", 0, 0.2),
        ]  # fmt: skip
        assert plan.take() is None
        for run in taken[2:]:
            assert plan.take() is None
            plan.add(result_of(run, run.rate))
        other = plan.take()
        assert other.key == ("d_model=16", 1, 0.2)
        assert plan.take() is None
        for run in [*taken[:2], other]:
            plan.add(result_of(run, 1 - run.rate))
        assert plan.progress() == "5/6"
        assert plan.has_pending
        last = plan.take()
        assert last.key == ("d_model=8", 1, 0.1)
        plan.add(result_of(last, 0.5))
        assert not plan.has_pending
        assert [(row["row"], row["seed"]) for row in plan.table()] == [
            ("d_model=8", 0), ("d_model=8", 1), ("d_model=16", 0), ("d_model=16", 1),
        ]  # fmt: skip


def test_concurrent_sweeps_share_the_work(tmp_path):
    keys = {"vary": {"model.layer.d_model": [8, 16]}}
    with plan_of(tmp_path, **keys) as one, plan_of(tmp_path, **keys) as two:
        first, second = one.take(), two.take()
        assert (first.row, second.row) == ("d_model=8", "d_model=16")
        assert one.take() is None
        one.add(result_of(first, 0.5))
        assert two.take() is None
        assert two.progress() == "1/2"
        two.add(result_of(second, 0.6))
        assert one.take() is None
        assert not one.has_pending
        assert one.table() == two.table()
    assert len(read_results(tmp_path / "sweep")) == 2


def test_sweep_waits_for_a_run_of_another_process(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    (run,) = make_runs(load_sweep(path))["base"]
    other = Lock.of_run(Path(run.config.run.directory))
    other.acquire()

    def until(seconds):
        other.close()

    monkeypatch.setattr("train.sweeps.sweep.time.sleep", until)
    trained = Trained(monkeypatch, lambda run: 0.5)
    assert mc(monkeypatch, "sweep", path) == 0
    assert len(trained) == 1
    waiting = f"waiting for a run of another process: {run.config.run.directory}: in use by"
    assert f"{waiting} process {os.getpid()} on " in capsys.readouterr().out


# Lines are longer than any buffer.
APPEND = """
import sys
from pathlib import Path
from train.sweeps.results import Results
results = Results(Path(sys.argv[1]))
for seed in range(50):
    results.add({"row": sys.argv[2], "seed": seed, "rate": 0.1, "fingerprint": "x" * 100_000})
"""


def test_concurrent_appends_keep_all_lines(tmp_path):
    """After an incomplete line, no line is lost or interleaved with another one."""
    (tmp_path / "results.jsonl").write_text(
        '{"row": "a", "seed": 0, "rate": 0.1, "fingerprint": ""}\n{"row": "b'
    )
    both = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(tmp_path), name], cwd=ROOT)
        for name in "bc"
    ]
    assert [process.wait() for process in both] == [0, 0]
    rows = read_results(tmp_path)
    assert rows[0]["row"] == "a"
    assert len(rows) == 101


def without_times(rows):
    free = ("seconds", "wall_seconds", "machine")  # a worker has fewer cores
    return [{key: value for key, value in row.items() if key not in free} for row in rows]


def test_sweep_computes_with_one_thread(tmp_path, monkeypatch):
    """Unless NPROC is set; the environment is restored afterwards."""
    monkeypatch.delenv("NPROC", raising=False)
    seen = []
    Trained(monkeypatch, lambda run: seen.append(os.environ["NPROC"]) or 0.5)
    assert mc(monkeypatch, "sweep", write(tmp_path, seeds=[0])) == 0
    assert "NPROC" not in os.environ
    monkeypatch.setenv("NPROC", "3")
    assert mc(monkeypatch, "sweep", write(tmp_path, seeds=[1])) == 0
    assert seen == ["1", "3"]
    assert os.environ["NPROC"] == "3"


def sweep(path: Path, jobs: int, kill_when=None) -> list[dict]:
    """Run the command in a subprocess, which may be killed, and return its results."""
    words = [sys.executable, "-m", "train", "sweep", path, "--jobs", str(jobs)]
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    process = subprocess.Popen([*words, "--markdown", path.with_suffix(".md")], cwd=ROOT, env=env)
    folder = Path(load_sweep(path).directory)
    if kill_when is not None:
        try:
            wait_for(lambda: kill_when(folder) or process.poll() is not None, 600)
        finally:
            process.kill()
    assert process.wait() == (0 if kill_when is None else -signal.SIGKILL)
    return sorted(read_results(folder), key=key_of)


@two_cores
@pytest.mark.slow
def test_results_do_not_depend_on_jobs_or_interrupts(tmp_path):
    """At a size at which sums of XLA depend on the number of threads."""
    base = str(ROOT / "configs" / "mqar" / "base.yaml")
    short = {"run.steps": 4, "run.save_every": 1, "optimizer.warmup_steps": 2}
    rows = [short | {"run.batch_size": size} for size in (64, 32, 16)]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write(folder, base=base, rows=rows)
    whole = sweep(one / "small.yaml", 1)
    assert len(whole) == 3
    assert len(sweep(two / "small.yaml", 2, read_results)) < 3
    assert without_times(sweep(two / "small.yaml", 2)) == without_times(whole)
    for folder in (one, two):
        table = (folder / "small.md").read_text()
        assert re.findall(r"batch_size=(\d+) \|", table) == ["64", "32", "16"]


def test_interrupt_in_another_thread_is_delayed():
    """A signal delivered to another thread must not interrupt the start of a worker."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done, other = threading.Event(), threading.Thread(target=lambda: done.wait(60))
    other.start()
    steps = []

    def be_interrupted() -> None:
        with _no_interrupt():
            signal.pthread_kill(other.ident, signal.SIGINT)
            time.sleep(0.2)
            steps.append("whole")

    try:
        with pytest.raises(KeyboardInterrupt):
            be_interrupted()
    finally:
        done.set()
        other.join()
        signal.signal(signal.SIGINT, before)
    assert steps == ["whole"]


def processes_of(group: int) -> list[str]:
    """Return the commands of the processes of a group that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, ValueError):
            continue
    return found


@two_cores
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("ending", "begun"),
    [
        (signal.SIGINT, 2),
        (signal.SIGKILL, 2),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
    ],
)
def test_workers_end_with_the_sweep(tmp_path, ending, begun):
    """Ctrl-C reaches the whole group, even while workers start; SIGKILL only the parent."""
    path = write(tmp_path, vary={"model.layer.d_model": [8, 16]})
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "helpers" / "sweep_worker.py", path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: any("spawn_main" in words for words in processes_of(process.pid)))
        wait_for(lambda: len(list(tmp_path.glob("sweep/*/*/begun"))) >= begun)
        if ending == signal.SIGINT:
            os.killpg(process.pid, ending)
        else:
            process.send_signal(ending)
        _, err = process.communicate(timeout=60)
        wait_for(lambda: not processes_of(process.pid))
    finally:
        if processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (130 if ending == signal.SIGINT else -ending)
    if ending == signal.SIGINT:
        assert err == ""
