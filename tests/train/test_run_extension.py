"""Extended runs, and new runs from the weights of another."""

import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from helpers.interruptions import Stop
from helpers.sweeps import write
from helpers.tiny_run import mc, snapshot, write_config
from mc_core.errors import UserError
from train import step
from train.checkpoint import Checkpoints
from train.config import load_config
from train.evaluation.run_report import TextReport, load_report, save_report
from train.evaluation.validation import References
from train.loop import evaluate, train
from train.metrics import read_rows
from train.optimizer import make_schedule
from train.step import build
from train.sweeps.sweep_config import load_sweep, make_runs
from train.warm_start import initial_state

SIX = ("run.steps=6", "run.save_every=3", "run.log_every=1", "run.validate_every=0")
TWELVE = ("run.steps=12", *SIX[1:])
CONSTANT = ("optimizer.final_fraction=1.0", "optimizer.warmup_steps=0")


class NoScoring:
    """Disable scoring, on which these tests do not depend."""

    def __init__(self, config, corpus, graphdef):
        pass

    def row(self, state):
        return {}

    def report(self, state, step, seconds):
        few = {"bits_per_byte": 1.0, "validation_bytes": 1, "validation_sha256": ""}
        return TextReport("tiny", "", 1, step, 1, seconds, documents=(1, 1), unit="byte",
                          positions=[], references=References(8.0, 1.0, 1.0), **few)  # fmt: skip

    def with_heads(self, state, report):
        return report

    def finish(self, directory, state, report):
        save_report(directory, report)
        return report


def simple_loss(graphdef, params, rest, batch):
    """Return a loss that every parameter and every batch changes, and that compiles quickly."""
    target = batch.astype(jnp.float32).mean() / 100
    return sum(jnp.mean((leaf - target) ** 2) for leaf in jax.tree.leaves(params)), rest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("train.step.sum_losses", simple_loss)
    monkeypatch.setattr("train.tasks.text.TextScoring", NoScoring)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The configuration of a run in `runs/tiny`, finished after six steps."""
    folder = tmp_path_factory.mktemp("extend")
    path = write_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.step.sum_losses", simple_loss)
        patch.setattr("train.tasks.text.TextScoring", NoScoring)
        run(path, *SIX)
    return folder


@pytest.fixture(scope="module")
def grown(folder, tmp_path_factory) -> tuple[Path, str]:
    """The configuration of a copy extended to twelve steps, and its output."""
    path = copy(folder, tmp_path_factory.mktemp("grown"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.step.sum_losses", simple_loss)
        patch.setattr("train.tasks.text.TextScoring", NoScoring)
        return path, run(path, *TWELVE)[1]


def copy(folder: Path, to: Path) -> Path:
    """Copy the finished run, and return the configuration of the copy."""
    shutil.copytree(folder / "runs", to / "runs")
    text = (folder / "tiny.yaml").read_text()
    (to / "tiny.yaml").write_text(text.replace(str(folder / "runs"), str(to / "runs")))
    return to / "tiny.yaml"


@pytest.fixture
def one_program(monkeypatch) -> None:
    """Share one compiled step between all runs of a test."""
    make, made = step.make_train_step, []

    def make_once(*args):
        made.append(made[0] if made else make(*args))
        return made[0]

    monkeypatch.setattr(step, "make_train_step", make_once)


@pytest.fixture
def path(folder, tmp_path) -> Path:
    """The configuration of a copy of that run."""
    return copy(folder, tmp_path)


def run(path: Path, *words: str) -> tuple[TextReport, str]:
    """Train, and return the report and what was printed."""
    out = io.StringIO()
    report = train(load_config(path, words), Console(file=out, width=200))
    return report, out.getvalue()


def arrays(path: Path, *words: str) -> dict[str, np.ndarray]:
    """Return all arrays of a run's last checkpoint."""
    config = load_config(path, words)
    with Checkpoints(Path(config.run.directory)) as checkpoints:
        state = checkpoints.restore(checkpoints.latest(), build(config)[1])
    return flat(state)


def flat(state) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(key): np.asarray(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def test_extended_run_equals_longer_run_at_constant_rate(tmp_path, one_program):
    """Parameters, optimiser, data and curves continue bit-exactly."""
    path = write_config(tmp_path)
    other = f"run.directory={tmp_path / 'runs' / 'whole'}"
    run(path, *SIX, *CONSTANT)
    report, _ = run(path, *TWELVE, *CONSTANT)
    run(path, *TWELVE, *CONSTANT, other)
    whole, grown = (arrays(path, *TWELVE, *CONSTANT, *word) for word in ((other,), ()))
    assert grown.keys() == whole.keys()
    for name, array in whole.items():
        assert np.array_equal(grown[name], array), name
    losses = [
        [(row["step"], row["loss"]) for row in read_rows(tmp_path / "runs" / name)]
        for name in ("tiny", "whole")
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [*range(1, 13)]
    assert report.steps == load_report(tmp_path / "runs" / "tiny").steps == 12


def test_schedule_change_is_printed(grown):
    path, out = grown
    optimizer = load_config(path).optimizer
    old, new = (make_schedule(optimizer, steps) for steps in (6, 12))
    assert (
        f"run.steps grows from 6 to 12: the learning rate is {old(5):.3g} at step 6, "
        f"{new(6):.3g} at step 7, and {new(11):.3g} at step 12, on the cosine over 12 steps\n"
    ) in out
    rates = [row["learning_rate"] for row in read_rows(path.parent / "runs" / "tiny")]
    np.testing.assert_allclose(rates, [*map(old, range(6)), *map(new, range(6, 12))], rtol=1e-6)
    assert "grows" not in run(path, *TWELVE)[1]


def test_extended_run_needs_its_own_report(path, monkeypatch):
    """The report of fewer steps is neither printed nor compared with other runs."""
    directory = path.parent / "runs" / "tiny"
    stale = (directory / "report.json").read_bytes()

    def stop(*_):
        assert load_report(directory) is None
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(NoScoring, "finish", stop)
        with pytest.raises(Stop):
            run(path, *TWELVE)
    (directory / "report.json").write_bytes(stale)
    report, _ = run(path, *TWELVE)
    assert report.steps == load_report(directory).steps == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run.steps=5",), "with run.steps = 6, got 5: run.steps must not decrease"),
        (("run.steps=12", "run.seed=1"), "another config: run.seed was 0 and is 1"),
        (("run.steps=12", "optimizer.beta1=0.8"), "optimizer.beta1 was 0.9 and is 0.8"),
    ],
)
def test_only_steps_may_change(path, monkeypatch, capsys, words, message):
    before = snapshot(path.parent)
    assert mc(monkeypatch, "train", path, *SIX, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert snapshot(path.parent) == before


def test_extended_run_cannot_shrink(grown, monkeypatch, capsys):
    path, _ = grown
    assert mc(monkeypatch, "train", path, *SIX) == 2
    assert "run.steps must not decrease" in capsys.readouterr().err
    out = io.StringIO()
    report = evaluate(path.parent / "runs" / "tiny", Console(file=out))
    assert report.steps == 12


@pytest.mark.parametrize(
    ("is_grown", "message"),
    [(False, "run.steps was 6 and is 12"), (True, "extended at step 6")],
)
def test_sweep_refuses_extended_runs(path, grown, is_grown, message):
    """The learning rates of an extended run differ from those of its configuration."""
    config = load_config(grown[0] if is_grown else path, TWELVE)
    with pytest.raises(UserError, match=message):
        train(config, Console(file=io.StringIO()), claimed=True)


def test_older_checkpoint_resumes(path):
    file = path.parent / "runs" / "tiny" / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["grown"]
    for name in ("init_from", "init_optimizer", "param_dtype", "profile", "peak_flops"):
        del meta["config"]["run"][name]
    for name in ("name", "schedule", "decay_fraction", "momentum", "moment_dtype", "ema_decay"):
        del meta["config"]["optimizer"][name]
    file.write_text(json.dumps(meta))
    assert run(path, *SIX)[0].steps == 6
    with Checkpoints(path.parent / "runs" / "tiny") as checkpoints:
        assert checkpoints.meta(6).grown == ()


def new(path: Path, *words: str) -> list[str]:
    """Return the words of a new run that starts from the finished one."""
    runs = path.parent / "runs"
    return [*SIX, f"run.directory={runs / 'new'}", f"run.init_from={runs / 'tiny'}", *words]


def first_state(path: Path, monkeypatch, *words: str) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays before the first step of a new run, and what was printed."""
    seen, out = [], io.StringIO()

    def stop(config, state, console):
        seen.append(initial_state(config, state, console))
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.initial_state", stop)
        with pytest.raises(Stop):
            train(load_config(path, words), Console(file=out, width=200))
    return flat(seen[0]), out.getvalue()


@pytest.mark.parametrize("optimizer", ["false", "true"])
def test_init_from_copies_weights(path, monkeypatch, optimizer):
    """The source run is unchanged. The schedule restarts, with and without optimiser state."""
    before = snapshot(path.parent)
    words = new(path, f"run.init_optimizer={optimizer}", "run.seed=1")
    found, out = first_state(path, monkeypatch, *words)
    what = "parameters and moments" if optimizer == "true" else "parameters"
    assert f"starting from the {what} of step 6 of {path.parent / 'runs' / 'tiny'}\n" in out
    assert snapshot(path.parent) == before
    source, fresh = arrays(path, *SIX), flat(build(load_config(path, words))[1])
    assert found.keys() == source.keys()
    schedule = [name for name in found if name.startswith(".optimizer") and found[name].ndim == 0]
    assert len(schedule) == 2  # Adam's count and the schedule's
    for name, array in found.items():
        taken = name.startswith(".params") or (optimizer == "true" and name != schedule[-1])
        assert np.array_equal(array, (source if taken else fresh)[name]), name
    assert [int(found[name]) for name in schedule] == [6 if optimizer == "true" else 0, 0]


def test_resumed_run_does_not_need_init_from(path, one_program):
    words = new(path, "run.init_optimizer=true")
    run(path, *words)
    rates = [row["learning_rate"] for row in read_rows(path.parent / "runs" / "new")]
    schedule = make_schedule(load_config(path).optimizer, 6)
    np.testing.assert_allclose(rates, [*map(schedule, range(6))], rtol=1e-6)
    end = arrays(path, *words)
    shutil.rmtree(path.parent / "runs" / "new" / "checkpoints" / "6")
    shutil.rmtree(path.parent / "runs" / "tiny")
    _, out = run(path, *words)
    assert "resuming from step 3 of 6" in out
    for name, array in arrays(path, *words).items():
        assert np.array_equal(array, end[name]), name


def test_interrupt_message_names_the_step(path, monkeypatch, capsys):
    """Also check that the lock is released."""

    def stop(curves, step, **values):
        if step == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr("train.session.Curves.write", stop)
    assert mc(monkeypatch, "train", path, *TWELVE) == 130
    directory = path.parent / "runs" / "tiny"
    message = f"mc: interrupted: the same command resumes {directory} from step 9\n"
    assert capsys.readouterr().err == message
    assert not (directory / ".lock").exists()


def test_init_from_reports_other_settings(path, monkeypatch):
    _, out = first_state(path, monkeypatch, *new(path, "model.layer.segment_size=4"))
    assert "; model.layer.segment_size is 8 there and 4 here\n" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.ffn_width=8"], "has another architecture: blocks.0."),
        (["model.ffn_width=8"], "; model.ffn_width is 16 there and 8 here"),
        (["model.num_layers=2"], "is missing there and ["),
        (["run.init_from=nowhere"], "run.init_from: nowhere: no checkpoint found"),
        (["run.init_from={runs}/new"], "new: must not be this run's own directory"),
        (["run.init_from=null", "run.init_optimizer=true"], "run.init_optimizer = True: must be"),
        (["run.init_from=3"], "run.init_from = 3: must be of type str"),
    ],
)
def test_invalid_init_from_is_a_one_line_error(path, monkeypatch, capsys, words, message):
    before = snapshot(path.parent)
    words = [word.format(runs=path.parent / "runs") for word in words]
    assert mc(monkeypatch, "train", path, *new(path, *words)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert snapshot(path.parent) == before
    assert not (path.parent / "runs" / "new").exists()


def test_init_from_changes_the_fingerprint(tmp_path):
    rows = make_runs(load_sweep(write(tmp_path, rows=[{}, {"run.init_from": "x"}]))).values()
    assert len({runs[0].fingerprint for runs in rows}) == 2


def test_schedule_restart_keeps_moments():
    from train.warm_start import restart_schedule

    optimizer = optax.adamw(optax.constant_schedule(0.1))
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(params, state, params)
    adam, schedule = flat(state), flat(restart_schedule(state))
    changed = [name for name in adam if not np.array_equal(adam[name], schedule[name])]
    assert [int(schedule[name]) for name in changed] == [0]
