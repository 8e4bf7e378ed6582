"""`RUN KEY=VALUE`: caching added to a trained run, and configurations that need new parameters."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.tiny_run import fails, mc, untrained_run
from mc_core.errors import UserError
from mc_jax import LanguageModel, generate
from mc_jax.pretrained import get_weights
from parity.files import write_safetensors
from parity.weights import to_torch
from train.checkpoint import load_run
from train.config import load_config
from train.config.overrides import split_words
from train.evaluation.generate import load_source

MEAN = "model.layer.aggregation=mean"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a linear memory without a cache that has not trained."""
    words = ("model.mixers=[memory]", "model.layer.aggregation=none", "run.seed=7")
    return untrained_run(tmp_path_factory.mktemp("overrides"), *words)


def logits(model: LanguageModel) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.arange(40)[None]))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((MEAN,), marks=pytest.mark.slow),
        pytest.param((MEAN, "model.layer.segmentation=fenwick"), marks=pytest.mark.slow),
        pytest.param(
            ("model.layer.aggregation=residual", "model.layer.segment_size=4"),
            marks=pytest.mark.slow,
        ),
        ("model.layer.aggregation=grm", "model.layer.use_q_as_u=true"),
    ],
    ids=lambda words: " ".join(word.rpartition(".")[2] for word in words),
)
def test_overrides_keep_parameters_and_change_the_model(run, words):
    base = load_run(run)[1]
    varied, model, *_ = load_run(run, overrides=words)
    expected = ["model.mixers=[memory]", "run.seed=7", *words]
    assert varied == load_config(run.parent / "tiny.yaml", expected)
    left, right = get_weights(base), get_weights(model)
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)
    # The first segment has no cached memory; the cache changes later ones.
    before, after = logits(base), logits(model)
    size = varied.model.layer.segment_size
    np.testing.assert_allclose(after[:, :size], before[:, :size], atol=1e-6)
    assert np.abs(after - before).max() > 1e-3


def test_mean_of_restarted_sums_equals_the_base(run):
    """States of segments without decay add up to the state of the whole; the norm drops 1 / n."""
    words = (MEAN, "model.layer.state_init_mode=restart")
    base, model = (load_run(run, overrides=words)[1] for words in ((), words))
    np.testing.assert_allclose(logits(model), logits(base), atol=1e-5)


def test_unused_parameters_are_dropped(tmp_path):
    run = untrained_run(tmp_path, "model.mixers=[memory]")
    base, model = (load_run(run, overrides=words)[1] for words in ((), (MEAN,)))
    dropped = get_weights(base).keys() - get_weights(model).keys()
    assert dropped == {"blocks.0.mixer.u_proj.kernel"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "model.layer.aggregation=soup",
            "soup: needs parameters that the trained model does not have: "
            "blocks.0.mixer.u_proj.kernel [8, 8]; train a run with this configuration",
        ),
        ("model.ffn_width=32", "ffn.gate_proj.kernel [8, 32] (trained: [8, 16])"),
        ("model.num_layers=2", " and "),
        ("model.layer.aggregation=median", "model.layer.aggregation = 'median': must be one of"),
        ("model.layer.agregation=mean", "model.layer: unknown key 'agregation'"),
        ("run.seed=3", "run.seed=3: only keys of model and data.window, run.batch_size, run.dtype"),
        ("data.corpus=x", "data.corpus=x: only keys of model"),
    ],
)
def test_overrides_that_need_training_are_refused(run, monkeypatch, capsys, word, message):
    config = run.parent / "tiny.yaml"
    fails(config, monkeypatch, capsys, message, "generate", run, word, "--prompt", "a")


def test_paths_with_equals_signs_are_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kind=delta,rate=0.01").mkdir()
    (tmp_path / "model.rate=1").mkdir()
    words = ["kind=delta,rate=0.01", "model.rate=1", "elsewhere/x=1", MEAN]
    paths, overrides = split_words(words)
    assert (list(map(str, paths)), overrides) == (words[:3], [MEAN])


def test_commands_take_overrides(run, tmp_path, monkeypatch, capsys):
    """Evaluation and generation use the changed model, and the report names the change."""
    model = load_run(run, overrides=[MEAN])[1]
    assert mc(monkeypatch, "generate", run, MEAN, "--prompt", "the", "--max-tokens", 4) == 0
    steps = list(generate(model, [list(b"the")], 4))
    text = bytes(int(step[0]) for step in steps).decode(errors="replace")
    assert capsys.readouterr().out == text

    numbers = tmp_path / "numbers.json"
    assert mc(monkeypatch, "evaluate", run, MEAN, "--json", numbers) == 0
    found = json.loads(numbers.read_text())
    assert (found["model"], found["overrides"]) == ("linear + mean", [MEAN])
    assert f"tiny {MEAN}" in capsys.readouterr().out.replace("\n", " ")

    file = tmp_path / "model.safetensors"
    write_safetensors(file, model.config, to_torch(get_weights(model)), "bytes")
    source, _ = load_source(file, None, ["model.layer.aggregation=residual"])
    assert source.config.layer.aggregation == "residual"
    with pytest.raises(UserError, match=r"data.window=8: must begin with model\. for a file"):
        load_source(file, None, ["data.window=8"])


def test_inspection_of_an_untrained_model(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.evaluation.inspect.draw_layer", lambda *_: b"a picture")
    (tmp_path / "text.txt").write_text("a text of some length\n")
    config, seed = run.parent / "tiny.yaml", "run.seed=3"
    words = ["--random", config, "--text", "text.txt", "--json", "numbers.json"]
    assert mc(monkeypatch, "inspect", seed, *words) == 0
    assert "tiny run.seed=3 (untrained, linear + grm)" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "inspect").iterdir()} == {
        "inspect.html",
        "layer-0.png",
    }
    model = LanguageModel(load_config(config).model, rngs=nnx.Rngs(3))
    tokens = np.frombuffer(b"a text of some length\n", np.uint8).astype(np.int32)
    _, (trace,) = jax.jit(lambda tokens: model.inspect(tokens))(tokens[None])
    found = json.loads((tmp_path / "numbers.json").read_text())["layers"][0]
    np.testing.assert_allclose(found["gates"], trace.gates[0], rtol=1e-4, atol=1e-6)


def test_commands_need_one_run(run, monkeypatch, capsys):
    config = run.parent / "tiny.yaml"
    for words, message in (
        (["inspect", "--text", config], "RUN: give a run directory, or the YAML file of a run"),
        (["inspect", run, run, "--text", config], f"{run}: only keys of model"),
        (["generate", MEAN, "--prompt", "a"], f"{MEAN}: no checkpoint found"),
        (["evaluate", MEAN], "0 runs: give one"),
    ):
        fails(config, monkeypatch, capsys, message, *words)


def bits_by_hand(model: LanguageModel, text: bytes, window: int) -> list[float]:
    """Return the bits of bytes 1, 2, ... of a text, in windows that start with an empty state."""
    bits, run = [], jax.jit(lambda tokens: model(tokens))
    for start in range(0, len(text) - 1, window):
        ids = np.frombuffer(text[start : start + window + 1], np.uint8).astype(np.int32)
        rows = np.asarray(run(ids[None, :-1]), np.float64)[0]
        for row, target in zip(rows, ids[1:], strict=True):
            top = row.max()
            bits.append((top + math.log(np.exp(row - top).sum()) - row[target]) / math.log(2))
    return bits


def test_lengths_score_the_same_bytes_in_longer_windows(run, tmp_path, monkeypatch, capsys):
    text = (b"every segment of a long text, " * 4)[:97]
    (tmp_path / "x.txt").write_bytes(text)
    files = [tmp_path / f"found.{end}" for end in ("json", "md", "png")]
    options = zip(("--json", "--markdown", "--plot"), files, strict=True)
    words = ["--corpus", tmp_path / "x.txt", "--lengths", "32,8", "--compare", MEAN]
    assert mc(monkeypatch, "evaluate", run, *words, *(w for pair in options for w in pair)) == 0
    found = json.loads(files[0].read_text())
    assert (found["lengths"], found["trained"], found["bytes"]) == ([8, 32], 16, 97)
    models = [load_run(run, overrides=words)[1] for words in ((), (MEAN,))]
    totals = {}
    for number, model in enumerate(models):
        for length, row in zip((8, 32), found["models"][number]["lengths"], strict=True):
            bits = bits_by_hand(model, text, length)
            totals[number, length] = (sum(bits) + 8) / 97
            assert row["bits_per_byte"] == pytest.approx(totals[number, length], rel=1e-5)
            assert row["interval"][0] < sum(bits) / 97 < row["interval"][1]
            for place in row["positions"]:
                own = [x for i, x in enumerate(bits) if place["start"] <= i % length < place["end"]]
                assert place["tokens"] == len(own)
                assert place["bits"] == pytest.approx(np.mean(own), rel=1e-5)
    rows = found["models"][1]["lengths"]
    assert [[p["start"], p["end"]] for p in rows[1]["positions"]] == [[0, 16], [16, 32]]
    assert rows[0]["change"] is None
    assert rows[1]["change"] == pytest.approx(totals[1, 32] - totals[1, 8], abs=1e-5)
    assert rows[1]["difference"] == pytest.approx(totals[1, 32] - totals[0, 32], abs=1e-5)
    low, high = rows[1]["difference_interval"]
    assert low <= rows[1]["difference"] <= high
    assert "difference: from run with the same window" in files[1].read_text()
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert "windows of 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "8,x"], "--lengths '8,x': must have the form tokens,tokens,..."),
        (["--lengths", "8,8"], "--lengths '8,8': must be distinct and >= 1"),
        (["--lengths", "8", "--compare", "model.layer.aggregation=soup"], "needs parameters that"),
        (["--compare", MEAN], "--compare: needs --lengths"),
        (["--plot", "x.png"], "--plot: not supported by --task text"),
        (["--task", "niah", "--compare", MEAN], "--compare: not supported by --task niah"),
    ],
)
def test_invalid_length_options_are_refused(run, monkeypatch, capsys, words, message):
    fails(run.parent / "tiny.yaml", monkeypatch, capsys, message, "evaluate", run, *words)
