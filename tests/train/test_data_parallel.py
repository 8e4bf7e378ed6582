"""Data parallelism: several devices match one, and checkpoints move between them."""

import io
import os
import subprocess

import jax
import numpy as np
import pytest
import yaml
from rich.console import Console

from helpers.interruptions import train_until
from helpers.tiny_run import COMMAND, TINY, write_config
from mc_core.errors import UserError
from mc_jax.sharding import axes_sharding, make_mesh, mesh_of, request, split_rows
from train.checkpoint import Checkpoints, Meta, check_same_run, load_run
from train.config import load_config, to_dict
from train.loop import build, train
from train.mesh import open_mesh
from train.metrics import read_rows
from train.step import split
from train.tasks.task import load_task

SMALL = ("run.steps=4", "run.log_every=1", "run.batch_size=4", "run.validate_every=2")
MQAR = (
    "data.task=mqar",
    "data.vocab_size=32",
    "data.lengths=[[16,2],[16,4]]",
    "data.examples=64",
    "data.validation_examples=8",
)
TITANS = ("model.layer.memory.kind=titans", "model.layer.memory.expansion=1")
CASES = {
    "text": (*TITANS, "model.layer.aggregation=ssc", "run.accumulation=2"),
    "mqar": MQAR,
}


def run_machine(devices, config, *words):
    """Train, and return the rows of the curves, the parameters and the report."""
    run = config.parent / "runs" / f"on{devices}"
    loaded = load_config(config, [*words, f"run.mesh.data={devices}", f"run.directory={run}"])
    report = train(loaded, Console(file=io.StringIO()))
    return read_rows(run), parameters(run), report


def parameters(run):
    return jax.tree.leaves(jax.tree.map(np.asarray, load_run(run)[1]))


def assert_equal_rows(one, other, tolerance):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for key in a.keys() & b.keys() - {"time", "seconds", "tokens_per_second"}:
            within = 10 * tolerance if key == "grad_norm" else tolerance
            assert a[key] == pytest.approx(b[key], rel=within), (key, a["step"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("case", ["text", "mqar"])
def test_two_devices_match_one(case, tmp_path, monkeypatch):
    """Losses, gradient norms, validation and report are equal; each device has half of the rows."""
    seen = []

    def build_seen(config, mesh):
        graphdef, state, step = build(config, mesh)

        def step_seen(state, batch):
            state, metrics = step(state, batch)
            if mesh.size > 1:
                seen.append(jax.tree.leaves(batch))
                assert step._cache_size() == 1
                held = jax.tree.leaves(state)
                assert all(len(x.devices()) == 2 and x.is_fully_replicated for x in held)
            return state, metrics

        return graphdef, state, step_seen

    monkeypatch.setattr("train.loop.build", build_seen)
    config = write_config(tmp_path)
    words = (*SMALL, *CASES[case])
    rows, _, report = run_machine(1, config, *words)
    split, _, split_report = run_machine(2, config, *words)
    assert_equal_rows(rows, split, 1e-5)
    assert sum("loss" in row for row in rows) == 4
    bits = lambda report: getattr(report, "bits_per_byte", None) or report.score["loss"]  # noqa: E731
    assert bits(split_report) == pytest.approx(bits(report), rel=1e-5)
    assert len(seen) == 4
    for batch in seen:
        for array in batch:
            shards = array.addressable_shards
            assert len({shard.device for shard in shards}) == 2
            assert [shard.data.shape[1] for shard in shards] == [2, 2]
            assert {shard.index[1].start or 0 for shard in shards} == {0, 2}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_checkpoints_resume_on_other_device_counts(before, after, tmp_path, monkeypatch):
    run = {"directory": str(tmp_path / "runs" / "tiny"), "batch_size": 4, "save_every": 4}
    config = write_config(
        tmp_path, run=TINY["run"] | run | {"mesh": {"data": before}, "log_every": 1}
    )
    whole, expected, _ = run_machine(1, config)
    train_until(8, config, monkeypatch)
    again = load_config(config, [f"run.mesh.data={after}"])
    console = Console(file=io.StringIO())
    train(again, console)
    assert "resuming from step 4" in console.file.getvalue()
    rows = read_rows(tmp_path / "runs" / "tiny")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert_equal_rows(whole, rows, 1e-4)
    for a, b in zip(expected, parameters(tmp_path / "runs" / "tiny"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_command_creates_cpu_devices(tmp_path):
    """Runs in a subprocess, because this process has eight devices."""
    config = write_config(tmp_path)
    words = ["run.steps=3", "run.mesh.data=2", "run.log_every=1", "run.validate_every=0"]
    command = [*COMMAND, "train", str(config), *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "tiny")] == [1, 2, 3]


def test_sweep_requests_devices_of_its_runs(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def ask(count):
        raise Asked(count)

    from train.sweeps.sweep import sweep

    base = write_config(tmp_path, model=TINY["model"] | {"vocab_size": 32})
    loaded = yaml.safe_load(base.read_text())
    loaded["data"] = {"task": "mqar", "vocab_size": 32, "lengths": [[16, 2]]}
    base.write_text(yaml.safe_dump(loaded))
    path = tmp_path / "sweep.yaml"
    path.write_text("base: tiny.yaml\nrows: [{run.mesh.data: 1}, {run.mesh.data: 2}]\n")
    monkeypatch.setattr("train.sweeps.sweep.request", ask)
    with pytest.raises(Asked, match="2"):
        sweep(path, Console(file=io.StringIO()))


def test_too_many_devices_are_refused_early(tmp_path):
    words = ["run.mesh.data=9", "run.batch_size=9", "data.corpus=nowhere"]
    config = load_config(write_config(tmp_path), words)
    message = r"run.mesh = 9: must be <= 8, the number of CPU devices that JAX sees"
    with pytest.raises(UserError, match=message):
        train(config, Console(file=io.StringIO()))
    assert not (tmp_path / "runs").exists()


def test_one_device_is_the_default(tmp_path):
    config = load_config(write_config(tmp_path))
    assert config.run.mesh.cpu_devices == open_mesh(config.run.mesh).size == 1
    there = jax.local_device_count()
    request(9)  # ignored after initialization, without an error
    assert jax.local_device_count() == there


def test_rows_that_the_mesh_does_not_divide_are_replicated():
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    params = jax.device_put(jax.numpy.ones(2), axes_sharding(mesh))
    batch = split_rows({"even": np.ones((8, 2)), "odd": np.ones((6, 2))}, params)
    assert mesh_of(batch) == mesh
    assert [x.addressable_shards[0].data.shape for x in (batch["even"], batch["odd"])] == [
        (2, 2),
        (6, 2),
    ]
    assert split_rows(np.ones(2), jax.numpy.ones(2)).shape == (2,)  # parameters without a mesh


def test_run_with_devices_of_an_older_version_resumes(tmp_path):
    """Its key `run.devices` is `run.mesh.data`."""
    path = write_config(tmp_path)
    config = load_config(path, ["run.mesh.data=2"])
    run, task = tmp_path / "runs" / "tiny", load_task(config)
    saved = to_dict(config)
    del saved["run"]["mesh"]
    saved["run"]["devices"] = 2
    state = build(config)[1]
    with Checkpoints(run, keep=1) as checkpoints:
        checkpoints.save(3, state, task.batches(), Meta(saved, task.fingerprint, 0.0))
    found, model, step, meta = load_run(run)
    assert (found, step) == (config, 3)
    check_same_run(run, meta, meta._replace(config=to_dict(load_config(path))))
    for a, b in zip(jax.tree.leaves(split(model)[1]), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
