"""`mc evaluate` on recall tasks: examples, scores and output files."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from helpers.recall_runs import MQAR, NIAH, known, write
from helpers.tiny_run import TINY, fails, mc, without_pictures, write_config
from mc_core.footprint import flops_per_token, model_parameters, state_bytes
from train.checkpoint import load_run
from train.config import from_dict, load_config
from train.config.recall_schema import MQARConfig, NIAHConfig
from train.evaluation import evaluate as subject
from train.evaluation.score import wilson
from train.tasks.mqar import make_draws


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The configurations of two short runs, with a checkpoint each."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        for name, data in (("mqar", MQAR), ("niah", NIAH)):
            made[name] = write(tmp_path_factory.mktemp(name), data, steps=3)
            assert mc(patch, "train", made[name]) == 0
    return made


def run_of(config):
    return config.parent / "runs" / "recall"


def test_mqar_by_pairs_and_distance(runs, tmp_path, monkeypatch, capsys):
    """A model that remembers ten tokens is correct up to this distance."""
    known(monkeypatch, lambda example, places: places - example.origins < 8)
    files = [tmp_path / f"x.{kind}" for kind in ("json", "md", "png")]
    words = ("--lengths", "24:2,24:6", "--examples", 40, "--seed", 4)
    outputs = ("--json", files[0], "--markdown", files[1], "--plot", files[2])
    assert mc(monkeypatch, "evaluate", run_of(runs["mqar"]), *words, *outputs) == 0
    out = capsys.readouterr().out
    found = json.loads(files[0].read_text())
    assert [(c["tokens"], c["pairs"], c["asked"]) for c in found["cells"]] == [
        (24, 2, 80), (24, 6, 240),
    ]  # fmt: skip
    shares = {part["distance"]: part for part in found["parts"]}
    assert set(shares) == {2, 4, 8, 16}
    assert [shares[d]["accuracy"] for d in (2, 4, 8, 16)] == [1, 1, 0, 0]
    assert sum(part["asked"] for part in found["parts"]) == 320
    assert sum(part["right"] for part in found["parts"]) == sum(c["right"] for c in found["cells"])
    for row in [*found["cells"], *found["parts"]]:
        assert (row["low"], row["high"]) == wilson(row["right"], row["asked"])
        assert row["accuracy"] == row["right"] / row["asked"]
    assert (found["seed"], found["examples"], found["step"]) == (4, 40, 3)
    assert {"jax", "Python"} <= found["machine"].keys()
    markdown = files[1].read_text()
    for cell in found["cells"]:
        assert f"| {cell['tokens']} | {cell['pairs']} | {100 * cell['accuracy']:.3g} |" in markdown
    assert "accuracy % by distance" in " ".join(out.split())
    interval = f"{100 * shares[2]['low']:.0f}-100"
    assert f"| 2 to 3 | 100 ({interval}) |" in markdown
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_niah_by_depth_and_length(runs, tmp_path, monkeypatch):
    """A needle is correct only if all tokens are; needles in the first half are wrong."""

    def right(example, places):
        half = example.origins < len(example.tokens) // 4
        return np.where(half, np.arange(len(places)) > 0, True)

    known(monkeypatch, right)
    path, plot = tmp_path / "x.json", tmp_path / "x.png"
    words = ("--lengths", "300,500", "--depths", 3, "--examples", 5, "--value", "uuid")
    run = run_of(runs["niah"])
    assert mc(monkeypatch, "evaluate", run, *words, "--json", path, "--plot", plot) == 0
    found = json.loads(path.read_text())
    assert found["data"]["value"] == "uuid"
    assert [(p["tokens"], p["depth"], p["asked"]) for p in found["parts"]] == [
        (tokens, depth, 5) for tokens in (300, 500) for depth in (0.0, 0.5, 1.0)
    ]
    by_depth = {(p["tokens"], p["depth"]): p["accuracy"] for p in found["parts"]}
    assert by_depth[500, 0.0] == 0.0
    assert by_depth[500, 0.5] == by_depth[500, 1.0] == 1.0
    assert [cell["asked"] for cell in found["cells"]] == [15, 15]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_trained_model_answers(runs, tmp_path, monkeypatch, capsys):
    """With the real model; the incomplete last batch counts each example once."""
    path = tmp_path / "x.json"
    words = ("--lengths", "8:2,20:2", "--examples", 5, "--json", path)
    assert mc(monkeypatch, "evaluate", run_of(runs["mqar"]), *words) == 0
    cell, _ = json.loads(path.read_text())["cells"]
    assert cell["asked"] == 10
    assert 4.5 < cell["loss"] < 6.5
    check_heads(runs["mqar"], json.loads(path.read_text())["heads"], capsys.readouterr().out)
    first = path.read_text()
    assert mc(monkeypatch, "evaluate", run_of(runs["mqar"]), *words) == 0
    assert json.loads(path.read_text())["cells"] == json.loads(first)["cells"]


def check_heads(path, found, out):
    """Recall and dead heads are those of the longest test examples, in segments of 8 tokens."""
    config, model, _, _ = load_run(run_of(path))
    data = dataclasses.replace(config.data, lengths=((20, 2),))
    (draw,) = make_draws(data, data.lengths, seed=0)
    tokens = np.stack([draw("test", i).tokens for i in range(subject.HEAD_EXAMPLES)])
    (trace,) = jax.jit(lambda tokens: model.inspect(tokens))(tokens)[1]
    before, after, scale = (
        np.asarray(getattr(trace, f"segment_loss_{name}")) for name in ("before", "after", "scale")
    )
    expected = ((before - after) / scale)[:, :2].mean((0, 1))
    np.testing.assert_allclose(found["recall"], [expected], rtol=1e-5)
    assert found["dead"] == np.asarray(trace.dead_heads).all(0)[None].tolist()
    assert found["blocks"] == [0]
    assert "recall of cached memories" in " ".join(out.split())
    assert all(f"{recall:.3g}" in out for recall in found["recall"][0])


def test_nonfinite_loss_is_null_in_json(runs, tmp_path, monkeypatch):
    one = subject.Answers(*(np.full((1, 1), x) for x in (np.nan, False, 1.0, 2)))
    monkeypatch.setattr(subject, "make_answer", lambda graphdef, rows: lambda *asked: one)
    path = tmp_path / "x.json"
    assert mc(monkeypatch, "evaluate", run_of(runs["mqar"]), "--json", path) == 0
    for cell in json.loads(path.read_text(), parse_constant=pytest.fail)["cells"]:
        assert cell["loss"] is None


@pytest.mark.slow
def test_model_size_is_at_longest_test_examples(runs, tmp_path, monkeypatch, capsys):
    path, markdown = tmp_path / "x.json", tmp_path / "x.md"
    words = ("--lengths", "24:2,40:2", "--examples", 2, "--json", path, "--markdown", markdown)
    assert mc(monkeypatch, "evaluate", run_of(runs["mqar"]), *words) == 0
    size = json.loads(path.read_text())["size"]
    model = load_config(runs["mqar"]).model
    assert size == {
        "parameters": model_parameters(model),
        "tokens": 40,
        "state_bytes": state_bytes(model, 40),
        "flops_per_token": flops_per_token(model, 40),
    }
    for text in (capsys.readouterr().out, markdown.read_text()):
        assert f"parameters; {size['state_bytes']:,} bytes of state after 40 tokens" in text


def test_model_that_cannot_stream_has_no_state():
    """Logarithmic segments depend on the total length."""
    layer = TINY["model"]["layer"] | {"segmentation": "logarithmic"}
    config = from_dict(TINY | {"data": MQAR, "model": TINY["model"] | {"layer": layer}})
    size = subject.size_of(config.model, config.data, 7)
    assert size["state_bytes"] is None
    assert subject.size_line(size).startswith("7 parameters; streaming unsupported; ")


def test_help_shows_default_values(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert mc(monkeypatch, "evaluate", "--help") == 0
    plain = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    out = " ".join(plain.split())
    for words in ("the run's", "to twice the run's", "mqar 500, niah 20", "40"):
        assert f"[default: ({words})]" in out


def test_essay_is_held_out_text(tmp_path):
    """Essays of a text run are its held-out text; with --corpus, they are from the given files."""
    config = load_config(write_config(tmp_path), ["data.validation_fraction=0.3"])
    corpus = tuple(config.data.corpus)
    essay = subject.EvaluationOptions(task="niah", haystack="essay")
    data = subject.task_of(config, essay)
    assert (data.corpus, data.validation_fraction, data.haystack) == (corpus, 0.3, "essay")
    assert corpus != NIAHConfig().corpus
    data = subject.task_of(config, dataclasses.replace(essay, corpus=("a.txt", "b")))
    assert data.corpus == ("a.txt", "b")


def test_needles_in_given_files(runs, tmp_path, monkeypatch, capsys):
    seen = []

    def look(example, places):
        seen.append(bytes(example.tokens.astype(np.uint8)))
        return places >= 0

    known(monkeypatch, look)
    book = tmp_path / "book.txt"
    book.write_text("".join(f"A sentence about plums, number {i}. " for i in range(2000)))
    words = ("--haystack", "essay", "--corpus", book, "--depths", 2, "--examples", 2)
    assert mc(monkeypatch, "evaluate", run_of(runs["niah"]), *words, "--lengths", "400") == 0
    assert len(seen) == 4
    assert all(b"A sentence about plums, number 19" in text for text in seen)  # the last 5%
    book.unlink()
    message = f"{book}: "
    fails(runs["niah"], monkeypatch, capsys, message, "evaluate", run_of(runs["niah"]), *words)


def test_default_lengths_reach_twice_the_trained():
    trained = MQARConfig(64, ((16, 2), (32, 8)))
    assert subject.grid(trained) == (
        (16, 2), (32, 2), (32, 8), (64, 2), (64, 8), (64, 16),
    )  # fmt: skip
    assert subject.grid(NIAHConfig(lengths=(256, 512))) == (256, 512, 1024)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("mqar", ["--lengths", "8"], "--lengths '8': must have the form tokens:pairs"),
        ("mqar", ["--lengths", "8:2,8:2"], "--lengths '8:2,8:2': must be distinct"),
        ("niah", ["--lengths", "512,512"], "--lengths '512,512': must be distinct"),
        ("mqar", ["--json", "."], "Invalid value for '--json': file '.' is a directory."),
        ("mqar", ["--json", "nowhere/x.json"], "nowhere/x.json: its folder does not exist"),
        ("mqar", ["--markdown", "/"], "'--markdown': file '/' is a directory."),
        ("mqar", ["--plot", ""], "'--plot': file '' is a directory."),
        ("mqar", ["--lengths", "8:3"], "must be [tokens, pairs] with pairs >= 1"),
        ("mqar", ["--examples", "0"], "--examples = 0: must be >= 1"),
        ("mqar", ["--depths", "3"], "--depths: not supported by --task mqar"),
        ("mqar", ["--task", "niah"], "has no text"),
        ("mqar", ["--task", "text"], "use mqar or niah"),
        ("mqar", ["--task", "quiz"], "'--task'"),
        ("niah", ["--lengths", "300:2"], "must have the form tokens,tokens"),
        ("niah", ["--lengths", "30"], "data.lengths = 30: must be > "),
        ("mqar", ["--corpus", "book.txt"], "--corpus: not supported by --task mqar"),
        ("niah", ["--corpus", "book.txt"], "--corpus: not supported by --haystack noise"),
        ("niah", ["--depths", "0"], "depths = 0: must be >= 1"),
        ("niah", ["--value", "word"], "value = 'word': must be one of 'number', 'uuid'"),
    ],
)
def test_invalid_evaluate_task_options_are_refused(runs, monkeypatch, capsys, name, words, message):
    fails(runs[name], monkeypatch, capsys, message, "evaluate", run_of(runs[name]), *words)


@pytest.mark.slow
def test_text_run_answers_recall_tasks(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path)
    assert mc(monkeypatch, "train", config, "run.steps=3") == 0
    run = tmp_path / "runs" / "tiny"
    words = ("--task", "mqar", "--lengths", "16:2", "--examples", 2)
    assert mc(monkeypatch, "evaluate", run, *words) == 0
    assert "queries" in capsys.readouterr().out
    fails(config, monkeypatch, capsys, "use mqar or niah", "evaluate", run, "--examples", 3)
