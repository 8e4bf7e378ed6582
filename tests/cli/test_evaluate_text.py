"""`mc evaluate` on text: validation text or other text, numbers and tables."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import normalizers

from helpers.recall_runs import MQAR, known
from helpers.tiny_run import fails, mc, untrained_run, write_config
from helpers.tokenizer_files import byte_level, words
from mc_core.errors import UserError
from train.config import load_config
from train.evaluation.options import EvaluationOptions

TEXT = "a text that no run has seen before, é\r\n" * 5
NIAH = {"task": "niah", "lengths": [300], "depths": 3}


@pytest.fixture(scope="module", autouse=True)
def bits():
    """A fake model: the bits of a token are the number of digits of its id."""

    def token_losses(graphdef, params, rest, tokens):
        digits = 1 + (tokens[:, 1:] > 9) + (tokens[:, 1:] > 99)
        return math.log(2) * digits.astype(jnp.float32), rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluation.validation.token_losses", token_losses)
        yield


def cost(tokens: np.ndarray, vocab_size: int) -> float:
    """Bits of all tokens; the first one costs log2(vocab_size)."""
    return sum(len(str(token)) for token in tokens.tolist()[1:]) + math.log2(vocab_size)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "other.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_bits_per_byte_of_other_text(run, text, tmp_path, monkeypatch, capsys):
    """The whole text is scored; results are in JSON, Markdown and on the console."""
    files = [tmp_path / "x.json", tmp_path / "x.md"]
    options = ("--corpus", text, "--json", files[0], "--markdown", files[1])
    assert mc(monkeypatch, "evaluate", run, *options) == 0
    found = json.loads(files[0].read_text())
    data = TEXT.encode()
    bits = cost(np.frombuffer(data, np.uint8), 256) / len(data)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert (found["bytes"], found["tokens"], found["documents"]) == (len(data), len(data), 1)
    assert (found["tokens_per_byte"], found["unit"], found["round_trip"]) == (1.0, "byte", None)
    assert found["sha256"] == hashlib.sha256(data).hexdigest()
    assert (found["run"], found["step"], found["task"]) == (str(run), 0, "text")
    assert (found["text"], found["window"]) == ([str(text)], 16)
    assert found["references"]["uniform"] == 8.0
    (bucket,) = found["positions"]
    assert (bucket["start"], bucket["end"], bucket["tokens"]) == (0, 16, len(data) - 1)
    total = bucket["bits"] * bucket["tokens"] + 8.0
    assert total == pytest.approx(found["bits_per_byte"] * len(data), rel=1e-6)
    assert {"jax", "Python"} <= found["machine"].keys()
    markdown = files[1].read_text()
    assert f"| attention | {bits:.4f} | +0.0000 |" in markdown
    assert f"| 0 to 15 | {bucket['bits']:.4f} | {len(data) - 1} |" in markdown
    out = capsys.readouterr().out
    assert f"{bits:.4f}" in out
    assert "1 document," in out
    assert "between documents" not in out


def test_files_and_folders_are_scored_in_order(run, text, tmp_path, monkeypatch, capsys):
    """Repeated files are scored repeatedly; documents are separated as in training."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text("no end")
    (folder / "a.txt").write_text("an end\n")
    path = tmp_path / "x.json"
    options = ("--corpus", folder, "--corpus", text, "--corpus", text, "--json", path)
    assert mc(monkeypatch, "evaluate", run, *options) == 0
    found = json.loads(path.read_text())
    expected = f"an end\nno end\n{TEXT}{TEXT}".encode()
    assert found["sha256"] == hashlib.sha256(expected).hexdigest()
    assert (found["documents"], found["bytes"]) == (4, len(expected))
    assert "between documents: a newline" in capsys.readouterr().out


def test_validation_text_results_are_written(run, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "x.json", tmp_path / "x.md"]
    options = ("--json", files[0], "--markdown", files[1])
    assert mc(monkeypatch, "evaluate", run, *options) == 0
    found, out = json.loads(files[0].read_text()), capsys.readouterr().out
    assert found["text"] == "validation"
    assert f"{found['bits_per_byte']:.3f}" in out
    assert "curves, checkpoints and plots" in out
    assert f"{found['bits_per_byte']:.4f}" in files[1].read_text()
    assert (found["bytes"], found["unit"]) == (500, "byte")


@pytest.mark.parametrize("end", [(), ("</s>",)])
def test_tokenized_run_scores_its_tokens(text, tmp_path, monkeypatch, capsys, end):
    """Lossy decoding is reported; a separator token has no bytes."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([*end])
    file = tmp_path / "t.json"
    tokenizer.save(str(file))
    run = untrained_run(tmp_path / "made", f"data.tokenizer={file}", "model.vocab_size=300")
    file.unlink()
    text.write_text("The Text")
    path = tmp_path / "x.json"
    assert mc(monkeypatch, "evaluate", run, *["--corpus", text] * 2, "--json", path) == 0
    found = json.loads(path.read_text())
    size = 16 if end else 17
    ids = tokenizer.encode(f"the text{end[0] if end else chr(10)}the text").ids
    assert (found["bytes"], found["tokens"], found["unit"]) == (size, len(ids), "token")
    assert found["tokens_per_byte"] == len(ids) / size
    assert found["bits_per_byte"] == pytest.approx(cost(np.array(ids), 300) / size, rel=1e-6)
    assert found["round_trip"]["lost"] == pytest.approx(4 / size)
    assert f"warning: {400 / size:.2g}% of the characters are" in capsys.readouterr().out
    assert ("</s>" if end else "a newline") in found["separator"]


def test_moved_run_scores_other_text_without_its_corpus(text, tmp_path, monkeypatch, capsys):
    """Recall tasks need no corpus either."""
    run = untrained_run(tmp_path / "made")
    moved = Path(shutil.move(run, tmp_path / "moved"))
    shutil.rmtree(tmp_path / "made" / "text")
    monkeypatch.chdir(tmp_path)
    message = "so there is no validation text: restore it, or give another text with --corpus"
    fails(text, monkeypatch, capsys, message, "evaluate", moved)
    assert mc(monkeypatch, "evaluate", "moved", "--corpus", "other.txt") == 0
    known(monkeypatch, lambda example, places: places > 0)
    mqar = ("--task", "mqar", "--examples", 2, "--lengths", "16:2")
    assert mc(monkeypatch, "evaluate", "moved", *mqar) == 0


def test_recall_run_on_bytes_scores_text(text, tmp_path, monkeypatch, capsys):
    run, path = untrained_run(tmp_path / "made", data=NIAH), tmp_path / "x.json"
    options = ("--task", "text", "--corpus", text, "--json", path)
    assert mc(monkeypatch, "evaluate", run, *options) == 0
    found, data = json.loads(path.read_text()), TEXT.encode()
    assert found["window"] == 300
    bits = cost(np.frombuffer(data, np.uint8), 256) / len(data)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    message = "a run on data.task = 'niah' has no validation text: give a text with --corpus"
    fails(text, monkeypatch, capsys, message, "evaluate", run, "--task", "text")


def test_mqar_run_refuses_text(text, tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "made", data=MQAR)
    message = "data.task = 'mqar' has no text"
    words = ("evaluate", run, "--task", "text", "--corpus", text)
    fails(text, monkeypatch, capsys, message, *words)


@pytest.mark.parametrize(
    "options",
    [
        {"examples": 3},
        {"examples": 3, "lengths": "64"},
        {"seed": 1},
        {"depths": 3, "corpus": ("x",)},
        {"haystack": "essay"},
        {"value": "uuid"},
    ],
)
def test_options_without_meaning_are_refused(tmp_path, options):
    from train.evaluation.options import check_text_options

    config = load_config(write_config(tmp_path))
    name = next(iter(options))
    with pytest.raises(UserError, match=f"^--{name}: not supported by --task text: use mqar or"):
        check_text_options(tmp_path, config, EvaluationOptions(**options), None)
    check_text_options(tmp_path, config, EvaluationOptions("text", corpus=("x",)), None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "x.png"], "--plot: not supported by --task text"),
        (["--json", "no/x.json"], "no/x.json: its folder does not exist"),
        (["--corpus", "nowhere"], "nowhere: no such file or folder: correct --corpus"),
        (["--corpus", "{folder}"], "{folder}: no file with text in this folder"),
        (["--corpus", "{folder}/.x"], ".x: the file is empty: remove it from --corpus"),
    ],
)
def test_invalid_evaluate_options_are_named(run, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / ".x").touch()
    given = [word.format(folder=tmp_path) for word in words]
    message = message.format(folder=tmp_path)
    fails(run.parent / "tiny.yaml", monkeypatch, capsys, message, "evaluate", run, *given)


def test_text_that_cannot_be_tokenized_is_named(text, tmp_path, monkeypatch, capsys):
    words("a").save(str(tmp_path / "t.json"))
    keys = (f"data.tokenizer={tmp_path / 't.json'}", "data.window=2")
    run = untrained_run(tmp_path / "made", *keys)
    for content, message in (
        (b"\xff", "--corpus: 'utf-8' codec can't decode"),
        (b" \n", "the tokenizer returns no token"),
    ):
        text.write_bytes(content)
        fails(text, monkeypatch, capsys, message, "evaluate", run, "--corpus", text)


def test_text_of_one_byte_has_no_position(run, tmp_path, monkeypatch):
    file, path = tmp_path / "one.txt", tmp_path / "x.json"
    file.write_bytes(b"a")
    options = ("--corpus", file, "--json", path, "--markdown", tmp_path / "x.md")
    assert mc(monkeypatch, "evaluate", run, *options) == 0
    found = json.loads(path.read_text())
    assert (found["bits_per_byte"], found["positions"]) == (8.0, [])
