"""Text is printed in any encoding; files and JSON lines are UTF-8."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest

from helpers.sweeps import Trained, write
from helpers.tiny_run import snapshot, write_config
from mc_core import LinearConfig
from train.checkpoint import Checkpoints, Meta
from train.cli import main
from train.config import load_config, to_dict
from train.evaluation.run_report import TextReport, save_report
from train.evaluation.sample import Sample
from train.evaluation.validation import References
from train.step import build
from train.tasks.task import load_task

ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8")
TEXT = "é漢 ±Δ\udcff"  # the last character is Python's escape of an invalid byte in a file name


def encoded(text: str, encoding: str) -> bytes:
    return text.encode(encoding, "replace")


def command(monkeypatch, encoding: str, *words: object) -> tuple[int, bytes, bytes]:
    """Run the command with standard streams of an encoding; return exit code and bytes."""
    out, err = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as patch:
        for name, stream in (("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
        patch.setattr(sys, "argv", ["mc", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        sys.stdout.flush()
        sys.stderr.flush()
        return int(stop.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in a directory with such a name, and with such text in its sample."""
    folder = tmp_path_factory.mktemp("encoding")
    config = write_config(folder)
    directory = folder / "runs" / "é漢"
    config.write_text(config.read_text().replace(str(folder / "runs" / "tiny"), str(directory)))
    loaded = load_config(config)
    task = load_task(loaded)
    with Checkpoints(directory) as checkpoints:
        meta = Meta(to_dict(loaded), task.fingerprint, 0.0)
        checkpoints.save(12, build(loaded)[1], task.batches(), meta)
    report = TextReport(
        name=directory.name, model="linear + grm", parameters=1, steps=12, tokens=1, seconds=1.0,
        bits_per_byte=1.0, validation_bytes=1, validation_sha256="", documents=(1, 1),
        references=References(8.0, 1.0, 1.0), unit="byte", sample=Sample("a prompt", TEXT, "drawn"),
        positions=[{"start": 0, "end": 16, "tokens": 1, "bits": 1.0}],
    )  # fmt: skip
    save_report(directory, report)
    return directory


@pytest.fixture
def completions(monkeypatch):
    """Replace all completions by the same text."""

    def complete(model, tokenizer, prompts, options, speed, *, first_row, show):
        row = SimpleNamespace(text=TEXT, tokens=4, finish="length")
        for number in range(len(prompts)):
            show(number, TEXT)
        return [row] * len(prompts)

    monkeypatch.setattr("train.evaluation.generate.complete", complete)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_completions_have_replacement_characters(run, completions, monkeypatch, encoding):
    code, out, err = command(monkeypatch, encoding, "generate", run, "--prompt", "a é")
    assert (code, out) == (0, encoded(TEXT, encoding)), err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_lines_are_utf8(run, completions, tmp_path, monkeypatch, encoding):
    """Prompts too, in stdout and in a file."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_bytes('{"é": "漢", "prompt": "é"}\n'.encode())
    words = ["generate", run, "--prompts", prompts]
    code, out, err = command(monkeypatch, encoding, *words)
    assert code == 0, err
    assert json.loads(out.decode()) == {
        "é": "漢", "prompt": "é", "completion": TEXT, "tokens": 4, "finish": "length"
    }  # fmt: skip
    assert "é漢 ±Δ".encode() in out
    assert command(monkeypatch, encoding, *words, "--output", output)[:2] == (0, b"")
    assert output.read_bytes() == out


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_report_of_a_run_is_printed(run, monkeypatch, encoding):
    config = run.parents[1] / "tiny.yaml"
    code, out, err = command(monkeypatch, encoding, "train", config)
    assert (code, err) == (0, b"")
    assert encoded("é漢 (linear + grm)", encoding) in out
    assert encoded("| é漢 ±Δ", encoding) in out
    assert encoded(str(run), encoding) in out


def test_tables_of_inspect_are_printed(run, tmp_path, monkeypatch):
    text = tmp_path / "é.txt"
    text.write_text("a text é", encoding="utf-8")
    code, out, err = command(monkeypatch, "ascii", "inspect", run, "--text", text)
    assert (code, err) == (0, b"")
    assert b"|?W|" in out
    assert "é漢 (step 12".encode() in (run / "inspect" / "inspect.html").read_bytes()


@pytest.mark.parametrize(("name", "encoding"), [("é±", "ascii"), (os.fsdecode(b"\xff"), "utf-8")])
def test_tables_of_a_sweep_are_printed(tmp_path, monkeypatch, encoding, name):
    """The file name may be invalid UTF-8; the Markdown file contains it unchanged."""
    Trained(monkeypatch, lambda run: 0.5)
    path = write(tmp_path).rename(tmp_path / f"{name}.yaml")
    directory = tmp_path / ("é±" if name == "é±" else "sweep")
    text = path.read_text().replace(str(tmp_path / "sweep"), str(directory))
    path.write_text(text, encoding="utf-8")
    words = ["sweep", path, "--markdown", tmp_path / "table.md"]
    code, out, err = command(monkeypatch, encoding, *words)
    assert (code, err) == (0, b"")
    assert encoded(f"results and plots: {directory}", encoding) in out
    assert os.fsencode(path) in (tmp_path / "table.md").read_bytes()


@pytest.mark.parametrize("words", [["variants"], ["--help"], ["generate", "--help"]])
def test_command_messages_are_printed(monkeypatch, words):
    monkeypatch.setattr(LinearConfig, "description", TEXT)
    code, out, err = command(monkeypatch, "ascii", *words)
    assert (code, err) == (0, b"")
    assert out.decode("ascii")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_errors_name_files_in_any_encoding(tmp_path, monkeypatch, encoding):
    for path in (tmp_path / "é漢.yaml", tmp_path / os.fsdecode(b"\xff.yaml")):
        code, out, err = command(monkeypatch, encoding, "train", path)
        assert (code, out) == (2, b"")
        name = encoded(str(path), encoding)
        message = b": No such file or directory, and no shipped configuration; nearest names: "
        assert err.startswith(b"mc: " + name + message)
        assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--prompt", "a", "--stop", "\udcff"], "?: must be UTF-8 text"),
        (["inspect", "--text", "x", "--needle", "\udcff"], "?: must be UTF-8 text"),
        (["generate", "--prompts", "{folder}/latin.jsonl"], "latin.jsonl: line 1: 'utf-8' codec"),
    ],
)
def test_arguments_must_be_utf8(run, tmp_path, monkeypatch, words, message):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    before = snapshot(run)
    name, *rest = (word.format(folder=tmp_path) for word in words)
    code, out, err = command(monkeypatch, "utf-8", name, run, *rest)
    assert (code, out) == (2, b"")
    assert message in err.decode()
    assert err.count(b"\n") == 1
    assert snapshot(run) == before


def test_arguments_are_utf8_in_any_locale(monkeypatch):
    """In an ASCII locale Python shows the bytes of é as two surrogates."""
    from train.cli.options import utf8
    from train.evaluation.prompts import read_prompts

    (prompt,) = read_prompts("\udcc3\udca9", None, None)
    assert prompt.text == "é".encode()
    assert utf8("\udcc3\udca9") == utf8("é") == "é"


def test_closed_stdout_is_not_an_error(run, completions, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "argv", ["mc", "generate", str(run), "--prompt", "a"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
