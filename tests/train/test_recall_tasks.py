"""Recall tasks in training: loss, report and resumption."""

import dataclasses
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from helpers.interruptions import Stop
from helpers.recall_runs import MQAR, NIAH, write
from helpers.tiny_run import TINY, fails, mc, write_config
from mc_core.errors import UserError
from train.checkpoint import Checkpoints
from train.config import from_dict, load_config, to_dict
from train.evaluation.score import Answers, make_answer, wilson
from train.loop import train
from train.metrics import read_rows
from train.step import answer_losses, build, sum_losses, sum_weights
from train.tasks.examples import stack
from train.tasks.task import load_task


def tiny(data: dict = MQAR, **run: object):
    return from_dict(TINY | {"data": data, "run": TINY["run"] | run})


@pytest.mark.parametrize("data", [MQAR, pytest.param(NIAH, marks=pytest.mark.slow)])
def test_loss_matches_full_logits_at_the_answers(data):
    config = tiny(data)
    graphdef, state, _ = build(config)
    batch = jax.tree.map(lambda x: x[0], next(load_task(config).batches()))
    weights = np.array(batch.weights)
    weights[0, 0] = 0.0
    batch = batch._replace(weights=weights)
    losses, right, _ = jax.jit(lambda *a: answer_losses(graphdef, *a))(
        state.params, state.rest, batch
    )
    run = jax.jit(lambda params, rest, tokens: nnx.merge(graphdef, params, rest)(tokens))
    logits = np.asarray(run(state.params, state.rest, jnp.asarray(batch.tokens)))
    logits = logits[np.arange(2)[:, None], batch.places]
    chances = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(chances, batch.labels[..., None], -1)[..., 0]
    expected[weights == 0] = 0
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    np.testing.assert_array_equal(right, logits.argmax(-1) == batch.labels)
    total, _ = jax.jit(lambda *a: sum_losses(graphdef, *a))(state.params, state.rest, batch)
    assert float(total / sum_weights(batch)) == pytest.approx(
        (expected * weights).sum() / weights.sum(), rel=1e-5
    )


def test_logits_are_computed_only_at_answers():
    """No array of the step is as large as the logits of all tokens."""
    config = tiny(MQAR | {"vocab_size": 250, "lengths": [[64, 2]]})
    graphdef, state, _ = build(config)
    batch = jax.tree.map(lambda x: x[0], next(load_task(config).batches()))
    text = str(jax.make_jaxpr(lambda *a: sum_losses(graphdef, *a))(state.params, state.rest, batch))
    shapes = set(re.findall(r"f32\[([\d,]+)\]", text))
    assert "2,2,256" in shapes
    assert not any(shape.endswith(",256") and "64" in shape.split(",") for shape in shapes)


@pytest.mark.slow
def test_model_overfits_a_small_set():
    """All queries of eight training examples are answered correctly."""
    data = MQAR | {"vocab_size": 16, "lengths": [[12, 3]], "examples": 8, "power": 1.0}
    config = tiny(data, steps=120, batch_size=8)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.05, weight_decay=0.0)
    config = dataclasses.replace(config, optimizer=optimizer)
    graphdef, state, step = build(config)
    batches = load_task(config).batches()
    losses = []
    for _ in range(config.run.steps):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(256), abs=0.5)
    assert losses[-1] < 0.05
    batch = jax.tree.map(lambda x: x[0], next(batches))
    _, right, _ = jax.jit(lambda *a: answer_losses(graphdef, *a))(state.params, state.rest, batch)
    assert right.all()


@pytest.mark.slow
def test_microbatches_equal_one_batch():
    config = tiny(accumulation=2)
    _, state, step = build(config)
    batch = next(load_task(config).batches())
    whole = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch)
    _, large = step(jax.tree.map(jnp.copy, state), whole)
    _, small = step(jax.tree.map(jnp.copy, state), batch)
    assert float(large.loss) == pytest.approx(float(small.loss), rel=1e-6)
    assert float(large.grad_norm) == pytest.approx(float(small.grad_norm), rel=1e-5)


def quiet(config: Path, *words: str):
    return train(load_config(config, words), Console(file=io.StringIO()))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("data", [MQAR, pytest.param(NIAH, marks=pytest.mark.slow)])
def test_interrupted_run_resumes_bit_exactly(tmp_path, monkeypatch, data):
    """Parameters, optimiser, curves and report are bit-equal; lengths of batches alternate."""
    config = write(tmp_path, data, log_every=1, save_every=5, validate_every=5)
    whole = quiet(config, f"run.directory={tmp_path / 'whole'}")
    save = Checkpoints.save

    def save_or_stop(self, at, *rest):
        if at == 10:
            raise Stop
        save(self, at, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_or_stop)
        with pytest.raises(Stop):
            quiet(config)
    report = quiet(config)
    run = tmp_path / "runs" / "recall"
    assert dataclasses.replace(report, name="whole", seconds=whole.seconds) == whole
    arrays = []
    for directory in (run, tmp_path / "whole"):
        _, like, _ = build(tiny(data))
        with Checkpoints(directory) as checkpoints:
            arrays.append(jax.tree.leaves(checkpoints.restore(12, like)))
    assert all(np.array_equal(*pair) for pair in zip(*arrays, strict=True))
    rows = [[(r["step"], r.get("loss")) for r in read_rows(x)] for x in (run, tmp_path / "whole")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in read_rows(run) if "validation_accuracy" in row] == [5, 10, 12]
    assert quiet(config) == report


def test_command_trains_and_reports(tmp_path, monkeypatch, capsys):
    config = write(tmp_path)
    assert mc(monkeypatch, "train", config) == 0
    out = capsys.readouterr().out
    run = tmp_path / "runs" / "recall"
    report = json.loads((run / "report.json").read_text())
    assert [(row["tokens"], row["pairs"], row["asked"]) for row in report["lengths"]] == [
        (8, 2, 14), (12, 3, 21),
    ]  # fmt: skip
    assert report["score"]["asked"] == 35
    assert report["tokens"] == 12 * 2 * 10
    assert f"{report['score']['accuracy']:.1%}" in out
    assert (run / "curves.png").exists()
    fails(config, monkeypatch, capsys, "data.lengths was [[8, 2], [12, 3]]", "train", config,
          "data.lengths=[[8, 2]]")  # fmt: skip
    fails(config, monkeypatch, capsys, "has no text", "generate", run, "--prompt", "x")
    fails(config, monkeypatch, capsys, "must be 'text'", "bench", "model", config)
    assert mc(monkeypatch, "train", config) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.task=quiz", "data.task = 'quiz': must be one of 'text', 'mqar', 'niah'"),
        ("data.task=[1]", "data.task = [1]: must be one of"),
        ("data.lengths=7", "data.lengths = 7: must be a list"),
        ("data.lengths=[[8]]", "data.lengths[0] = [8]: must be a list of 2 values"),
        ("data.lengths=[[8, 3]]", "data.lengths = [8, 3]: must be [tokens, pairs] with"),
        ("data.vocab_size=300", "model.vocab_size = 256: must be >= data.vocab_size = 300"),
        ("data.random_non_queries=1", "data.random_non_queries = 1: must be of type bool"),
        ("data.window=3", "data: unknown key 'window'; allowed are vocab_size, "),
        ("data.power=0.0", "data.power = 0.0: must be > 0.0"),
    ],
)
def test_configuration_errors_name_the_key(tmp_path, word, message):
    path = write(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(path, [word])


def test_another_task_replaces_the_data_section(tmp_path):
    text = write_config(tmp_path)
    assert load_config(text, ["data.task=text"]).data.window == 16
    assert load_config(text, ["data.task=niah"]).data.lengths == (512,)
    assert load_config(text, ["data.depths=4", "data.task=niah"]).data.depths == 4
    twin = tmp_path / "twin.yaml"
    twin.write_text("base: tiny.yaml\ndata: {task: niah, depths: 5}\n")
    loaded = load_config(twin, ["data.depths=6"])
    assert loaded.data.depths == 6
    assert from_dict(to_dict(loaded)) == loaded
    assert from_dict(json.loads(json.dumps(to_dict(loaded)))) == loaded


def test_text_task_is_omitted_from_checkpoints(tmp_path):
    """Checkpoints of versions without other tasks resume."""
    assert "task" not in to_dict(load_config(write_config(tmp_path)))["data"]


@pytest.mark.parametrize(("right", "asked"), [(0, 10), (3, 10), (10, 10), (1, 1), (700, 1000)])
def test_wilson_interval_solves_its_equation(right, asked):
    """The bounds solve |share - p| = z sqrt(p (1 - p) / n), or are 0 or 1."""
    low, high = wilson(right, asked)
    share = right / asked
    assert low <= share <= high
    for end in (low, high):
        if 0.0 < end < 1.0:
            z = abs(share - end) / np.sqrt(end * (1 - end) / asked)
            assert z == pytest.approx(1.96, abs=1e-3)
    assert (low == 0.0) == (right == 0)
    assert (high == 1.0) == (right == asked)


def test_answers_are_counted_singly_or_per_example():
    right = np.array([[1, 1, 0], [1, 0, 1], [1, 1, 1]], bool)
    weights = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1.0]])
    answers = Answers(np.ones((3, 3)), right, weights, np.arange(9).reshape(3, 3))
    assert answers.score()[:2] == (7, 8)
    assert answers.score(whole=True)[:2] == (2, 3)
    assert answers.score(answers.distances < 4)[:2] == (3, 3)


def test_answers_come_from_the_requested_split():
    """Each example counts once, even if the last batch is incomplete."""
    config = tiny()
    graphdef, state, _ = build(config)
    draw, seen = load_task(config).draws[0], set()

    def noted(split, index):
        seen.add((split, index))
        return draw(split, index)

    answers = make_answer(graphdef, 2)(state.params, state.rest, noted, "test", 3)
    assert seen == {("test", 0), ("test", 1), ("test", 2)}
    assert answers.right.shape == (3, 2)
    expected = [draw("test", i).places - draw("test", i).origins for i in range(3)]
    assert np.array_equal(answers.distances, expected)


def test_stacked_examples_keep_their_fields():
    draw = load_task(tiny()).draws[0]
    batch = stack([draw("test", i) for i in range(3)])
    assert batch.tokens.shape == (3, 8)
    assert np.array_equal(batch.labels[1], draw("test", 1).labels)
