"""`mc evaluate --recall`: slices of one and of several runs, files, and errors."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from helpers.recall_runs import MQAR
from helpers.tiny_run import fails, mc, untrained_run
from helpers.tokenizer_files import byte_level
from train.config import TextConfig
from train.data.corpus import load_corpus
from train.evaluation.recall_slices import HIT, count_hits, find_recurrences


@pytest.fixture(scope="module", autouse=True)
def bits():
    """A fake model: a byte has as many bits as its id has digits, and 1 more with a bias."""

    def token_losses(graphdef, params, rest, tokens):
        digits = 1 + (tokens[:, 1:] > 9) + (tokens[:, 1:] > 99)
        bias = params["embed"]["embedding"].shape[0] > 256
        return math.log(2) * (digits + bias).astype(jnp.float32), rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluation.validation.token_losses", token_losses)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same text; every token costs the second one a bit more."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        untrained_run(folder / "first"),
        untrained_run(folder / "second", "model.vocab_size=300"),
    ]


def named(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def test_slices_of_the_validation_text(runs, monkeypatch, capsys):
    """Numbers, tables and plot are written into the run's directory."""
    assert mc(monkeypatch, "evaluate", runs[0], "--recall", "--ngram", 3) == 0
    folder = runs[0] / "recall"
    found = json.loads((folder / "recall.json").read_text())
    data = {"window": 16, "validation_fraction": 0.3, "validation_bytes": 500}
    corpus = load_corpus(TextConfig((str(runs[0].parent / "text"),), **data), 256)
    tokens = corpus.validation_tokens()
    kinds = find_recurrences(tokens, 3, 16, 256)
    counts = count_hits(tokens, kinds, corpus.train, 3, 256)
    digits = np.array([len(str(token)) for token in tokens[1:]])
    (run,) = found["runs"]
    rows = named(run["slices"])
    assert rows["hits"]["tokens"] == (kinds.kind == HIT).sum()
    assert rows["hits"]["bits"] == pytest.approx(digits[kinds.kind == HIT].mean())
    low, high = rows["hits"]["bits_interval"]
    assert low < rows["hits"]["bits"] < high
    often = rows["count 10-99"]
    assert often["tokens"] == ((counts >= 10) & (counts < 100)).sum() > 0
    assert rows["all tokens"]["share"] == 1.0
    parts = ("hits", "misses", "other tokens")
    assert sum(rows[name]["tokens"] for name in parts) == found["tokens"] == len(tokens) - 1
    whole = sum(rows[name]["contribution"] for name in parts)
    assert whole == pytest.approx(digits.sum() / found["bytes"])
    assert (found["ngram"], found["window"], found["unit"]) == (3, 16, "byte")
    far = rows["distance >= 1024"]
    assert (far["tokens"], far["bits"], far["contribution"]) == (0, None, 0.0)
    assert (folder / "recall.png").read_bytes().startswith(b"\x89PNG")
    markdown = (folder / "recall.md").read_text()
    assert "| slice | bytes | % | bits/byte | 95% interval | contribution |" in markdown
    own = rows["misses"]
    share, ends = 100 * own["share"], own["bits_interval"]
    cells = (own["tokens"], f"{share:.1f}", f"{own['bits']:.3f}", f"{ends[0]:.3f} to {ends[1]:.3f}")
    assert f"| misses | {' | '.join(map(str, cells))} | {own['contribution']:.3f} |" in markdown
    assert "distance 1-15" in capsys.readouterr().out


def test_runs_are_compared_on_the_same_tokens(runs, tmp_path, monkeypatch, capsys):
    """Differences are paired: a constant difference has an interval of no width."""
    words = ("--recall", "--ngram", 2, "--window", 40, "--out", tmp_path / "new")
    assert mc(monkeypatch, "evaluate", *runs, *words) == 0
    found = json.loads((tmp_path / "new" / "recall.json").read_text())
    first, second = (run["slices"] for run in found["runs"])
    assert found["window"] == 40
    assert not any(row["difference"] for row in first)
    for one, other in zip(first, second, strict=True):
        assert one["tokens"] == other["tokens"]
        if one["tokens"]:
            assert other["difference"] == pytest.approx(1.0)
            assert other["bits"] == pytest.approx(one["bits"] + 1)
    hits = named(second)["hits"]
    assert hits["difference_interval"] == pytest.approx([1.0, 1.0])
    assert hits["bits_interval"][0] < hits["bits_interval"][1]
    # Both directories have the same name.
    assert [run["name"] for run in found["runs"]] == [str(run) for run in runs]
    markdown = (tmp_path / "new" / "recall.md").read_text()
    assert "| slice | bits/byte | difference | 95% interval | contribution |" in markdown
    assert f"| hits | {hits['bits']:.3f} | +1.000 | +1.000 to +1.000 |" in markdown
    assert "compared with" in " ".join(capsys.readouterr().out.split())


def test_other_text_is_scored(runs, tmp_path, monkeypatch):
    text = tmp_path / "other.txt"
    text.write_text("abcdefabcdef")
    files = {name: tmp_path / f"x.{name}" for name in ("json", "markdown", "plot")}
    outputs = [word for name, path in files.items() for word in (f"--{name}", path)]
    words = ("--task", "text", "--recall", "--corpus", text, *outputs)
    assert mc(monkeypatch, "evaluate", runs[1], *words) == 0
    assert all(path.is_file() for path in files.values())
    assert not (runs[1] / "recall").exists()
    found = json.loads(files["json"].read_text())
    rows = named(found["runs"][0]["slices"])
    # The second abcdef completes abcde and bcdef again.
    assert found["ngram"] == 5
    assert [rows[name]["tokens"] for name in ("hits", "misses", "other tokens")] == [2, 0, 9]
    assert rows["count 0"]["tokens"] == 2


def test_subwords_are_sliced_as_bigrams(tmp_path, monkeypatch):
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "t.json"))
    keys = (f"data.tokenizer={tmp_path / 't.json'}", "model.vocab_size=300")
    run = untrained_run(tmp_path / "made", *keys)
    assert mc(monkeypatch, "evaluate", run, "--recall") == 0
    found = json.loads((run / "recall" / "recall.json").read_text())
    assert (found["ngram"], found["unit"]) == (2, "token")
    assert named(found["runs"][0]["slices"])["hits"]["tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ngram", 2], "--ngram: needs --recall"),
        (["--window", 2], "--window: needs --recall"),
        (["--out", "x"], "--out: needs --recall"),
        (["{second}"], "2 runs: give one, or compare them with --recall"),
        (["--recall", "--ngram", 1], "'--ngram'"),
        (["--recall", "--ngram", 9], "--ngram = 9: must be <= 8 for a vocabulary of 256"),
        (["--recall", "--lengths", "64"], "--lengths: not supported by --recall"),
        (["--recall", "--task", "niah"], "--task niah: not supported by --recall: use text"),
        (["--recall", "--corpus", "nowhere"], "nowhere: no such file or folder"),
        (["--recall", "{longer}"], "data.window = 16 in {first} and 32 in {longer}: set --window"),
        (["--recall", "{other}"], "{other}: the validation text differs from that of {first}"),
        (["--recall", "{mqar}"], "a run on data.task = 'mqar' has no training text"),
    ],
)
def test_wrong_use_is_refused(runs, tmp_path, monkeypatch, capsys, words, message):
    made = {"first": runs[0], "second": runs[1]}
    for name, keys in (
        ("longer", {"overrides": ["data.window=32"]}),
        ("other", {"overrides": ["data.validation_bytes=400"]}),
        ("mqar", {"data": MQAR}),
    ):
        if f"{{{name}}}" in words:
            overrides = keys.pop("overrides", ())
            made[name] = untrained_run(tmp_path / name, *overrides, **keys)
    given = [str(word).format(**made) for word in words]
    message = message.format(**made)
    fails(runs[0] / "x", monkeypatch, capsys, message, "evaluate", runs[0], *given)


def test_text_of_one_token_is_refused(runs, tmp_path, monkeypatch, capsys):
    text = tmp_path / "one.txt"
    text.write_text("a")
    words = ("evaluate", runs[0], "--recall", "--corpus", text)
    fails(text, monkeypatch, capsys, "the text to score: needs at least 2 tokens", *words)
