"""The training loop: what it fetches, when it stops, and what its curves and traces have."""

import io
import os

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from helpers.interruptions import quiet
from helpers.tiny_run import mc, write_config
from mc_core.chips import CHIPS, find_chip
from mc_core.errors import NotFiniteError
from mc_core.footprint import flops_per_token
from train.checkpoint import Checkpoints, load_run, load_state
from train.config import load_config
from train.loop import train
from train.metrics import read_rows
from train.step import averaged, split
from train.utilization import make_mfu, memory


def simple_loss(graphdef, params, rest, batch):
    """Return a loss that every parameter and every batch changes, and that compiles quickly."""
    target = batch.astype(jnp.float32).mean() / 100
    return sum(jnp.mean((leaf - target) ** 2) for leaf in jax.tree.leaves(params)), rest


@pytest.fixture
def path(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr("train.step.sum_losses", simple_loss)
    return write_config(tmp_path)


def run_of(path):
    return path.parent / "runs" / "tiny"


def break_step(monkeypatch, number: int) -> None:
    """Make the loss of a step not finite."""
    count = iter(range(1, 100))
    place = "train.session.to_mesh"
    from train.distributed import to_mesh

    def spoil(batch, **options):
        return to_mesh(batch * (10_000 if next(count) == number else 1), **options)

    def loss(graphdef, params, rest, batch):
        total, rest = simple_loss(graphdef, params, rest, batch)
        return jnp.where(batch.max() > 255, jnp.nan, total), rest

    monkeypatch.setattr(place, spoil)
    monkeypatch.setattr("train.step.sum_losses", loss)


@pytest.mark.parametrize("due", ["log", "save"])
def test_nan_stops_the_run_at_the_next_fetch(path, monkeypatch, due):
    """Step 6 meets it; a checkpoint of step 8 is never written, with or without a row before it."""
    break_step(monkeypatch, 6)
    words = [f"run.log_every={3 if due == 'log' else 12}", "run.validate_every=0"]
    with pytest.raises(NotFiniteError, match=r"^step 6: the loss is not finite .* is step 4$"):
        quiet(path, *words)
    with Checkpoints(run_of(path)) as checkpoints:
        assert checkpoints.latest() == 4
    expected = [3] if due == "log" else []
    assert [row["step"] for row in read_rows(run_of(path))] == expected


def test_metrics_are_fetched_only_for_rows(path, monkeypatch):
    fetched, get = [], jax.device_get

    def seen(tree):
        fetched.append(tree)
        return get(tree)

    monkeypatch.setattr("train.session.jax.device_get", seen)
    quiet(path, "run.log_every=6", "run.save_every=6", "run.validate_every=0")
    assert len(fetched) == 2


def test_curves_have_mfu_and_waiting_time_and_a_trace_is_written(path):
    words = ["run.peak_flops=1e9", "run.profile=[2,3]", "run.validate_every=0"]
    quiet(path, *words)
    config = load_config(path, words)
    rows = read_rows(run_of(path))
    assert len(rows) == 4
    for row in rows:
        needed = 3 * flops_per_token(config.model, config.data.window) * row["tokens_per_second"]
        assert row["mfu"] == pytest.approx(needed / (1e9 * jax.device_count()))
        assert 0 <= row["data_wait_seconds"] < row["seconds"]
        assert not any("memory" in key for key in row)  # not reported by CPUs
    (trace,) = (run_of(path) / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert b"PjitFunction(step)" in trace.read_bytes()
    quiet(path, "run.steps=14", "run.validate_every=0")  # neither key belongs to the run
    assert "mfu" not in read_rows(run_of(path))[-1]


def test_peak_and_memory_of_known_devices(path, monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return {"bytes_in_use": self.used, "peak_bytes_in_use": 2 * self.used, "other": 1}

    devices = [Device(3), Device(5)]
    monkeypatch.setattr("train.utilization.jax.devices", lambda: devices)
    monkeypatch.setattr("train.utilization.jax.device_count", lambda: 2)
    monkeypatch.setattr("train.utilization.jax.local_devices", lambda: devices)
    config = load_config(path)
    needed = 3 * flops_per_token(config.model, config.data.window)
    assert make_mfu(config)(1e9) == {"mfu": pytest.approx(needed * 1e9 / (2 * 989.4e12))}
    assert memory() == {"memory_bytes": 5.0, "peak_memory_bytes": 10.0}
    assert find_chip("NVIDIA H100 PCIe") is None
    assert find_chip("TPU v5 lite") is CHIPS["v5e"]


@pytest.mark.slow
def test_average_of_parameters_resumes_and_is_loaded(path):
    words = ["optimizer.ema_decay=0.8", "run.validate_every=0"]
    other = [*words, f"run.directory={path.parent / 'runs' / 'whole'}"]
    quiet(path, *other)
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save

        def stop(self, step, *rest):
            if step == 8:
                raise KeyboardInterrupt
            save(self, step, *rest)

        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt, match="from step 4"):
            quiet(path, *words)
    assert "resuming from step 4" in quiet(path, *words)
    config, _, state, _, _ = load_state(run_of(path))
    whole = load_state(path.parent / "runs" / "whole")[2]
    for a, b in zip(*map(jax.tree.leaves, (state, whole)), strict=True):
        assert jnp.array_equal(a, b)
    loaded = split(load_run(run_of(path))[1])[1]
    mean = averaged(state, config).params
    for a, b in zip(*map(jax.tree.leaves, (loaded, mean)), strict=True):
        assert jnp.array_equal(a, b)
    assert any(
        not jnp.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (loaded, state.params)), strict=True)
    )


def test_moments_of_another_optimizer_are_refused(path, monkeypatch, capsys):
    quiet(path, "run.validate_every=0", "run.steps=4")
    words = ["run.init_optimizer=true", f"run.init_from={run_of(path)}"]
    words += [f"run.directory={path.parent / 'runs' / 'new'}", "optimizer.name=lion"]
    assert mc(monkeypatch, "train", path, *words) == 2
    message = "is adamw with moments in float32, and that of this run is lion with moments in"
    assert message in capsys.readouterr().err


def test_compilation_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    from train.compilation_cache import FOLDER, use_compilation_cache

    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(FOLDER, "/elsewhere")
    use_compilation_cache()
    assert os.environ[FOLDER] == "/elsewhere"
    for value in ("false", "0"):
        monkeypatch.delenv(FOLDER, raising=False)
        monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", value)
        use_compilation_cache()
        assert FOLDER not in os.environ
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert FOLDER not in os.environ
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("train.compilation_cache.os.access", lambda *_: False)
    use_compilation_cache()
    assert FOLDER not in os.environ
    assert settings == {}
    monkeypatch.undo()


def test_compilation_cache_is_used_by_imported_jax(tmp_path, monkeypatch):
    from train.compilation_cache import FOLDER, use_compilation_cache

    settings = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(FOLDER)
    use_compilation_cache()
    (folder,) = (tmp_path / "memory-caching-jax").iterdir()
    assert os.environ[FOLDER] == settings["jax_compilation_cache_dir"] == str(folder)


def test_failed_steps_end_the_reading_thread(path, monkeypatch):
    import threading

    def stop(*_, **__):
        raise RuntimeError("stop")

    monkeypatch.setattr("train.session.Curves.write", stop)
    with pytest.raises(RuntimeError, match="stop"):
        train(load_config(path), Console(file=io.StringIO()))
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]
