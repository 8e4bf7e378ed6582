"""`mc generate --output`: finished rows are saved, and interrupted outputs resume."""

import io
import json
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from helpers.interruptions import full_disk
from helpers.tiny_run import mc, write_config
from mc_core.errors import NotFiniteError, UserError
from train.checkpoint import Checkpoints, Meta
from train.config import load_config, to_dict
from train.evaluation import generate
from train.evaluation.prompts import read_prompts
from train.step import build
from train.tasks.task import load_task

TEXTS = ["the memory", "é segment", "a long bit", "keeps text", "é"]
OPTIONS = ["--max-tokens", 6, "--batch-size", 2, "--temperature", 1.5, "--seed", 3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run before its first step, and one with other parameters."""
    folder = tmp_path_factory.mktemp("resume")
    path = write_config(folder)
    config = load_config(path)
    task, state = load_task(config), build(config)[1]
    for seed in (0, 1):
        meta = Meta(to_dict(config), task.fingerprint, 0.0)
        with Checkpoints(folder / f"seed{seed}") as checkpoints:
            checkpoints.save(0, state, task.batches(), meta)
        state = state._replace(params=jax.tree.map(lambda x: 2 * x, state.params))
    return folder / "seed0"


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path)


def write_prompts(folder: Path, count: int = len(TEXTS)) -> Path:
    path = folder / "prompts.jsonl"
    rows = ({"id": number, "prompt": text} for number, text in enumerate(TEXTS[:count]))
    path.write_text("".join(map(line, rows)))
    return path


def line(row: dict) -> str:
    return json.dumps(row) + "\n"


def words(run: Path, prompts: Path, output: str = "out.jsonl", *more: object) -> list[object]:
    return ["generate", run, "--prompts", prompts, "--output", prompts.parent / output, *OPTIONS,
            *more]  # fmt: skip


def stop_before(monkeypatch, row: int, action: Callable[[], object]) -> list[int]:
    """Call `action` before the batch of a row, and return the first rows of the batches."""
    complete, asked = generate.complete, []

    def stopping(*args, first_row, **options):
        if first_row <= row < first_row + len(args[2]):
            action()
        asked.append(first_row)
        return complete(*args, first_row=first_row, **options)

    monkeypatch.setattr(generate, "complete", stopping)
    return asked


def fake_complete(model, tokenizer, prompts, options, speed, *, first_row, show):
    """Return completions that, like real ones, depend on a prompt, its row and the options."""
    return [
        SimpleNamespace(text=f"{row} {prompt.text} {options.seed}", tokens=6, finish="length")
        for row, prompt in enumerate(prompts, first_row)
    ]


@pytest.fixture
def fake(monkeypatch) -> None:
    monkeypatch.setattr(generate, "complete", fake_complete)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> bytes:
    """The output of an uninterrupted call."""
    prompts = write_prompts(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "complete", fake_complete)
        assert mc(patch, *words(run, prompts)) == 0
    return (prompts.parent / "out.jsonl").read_bytes()


@pytest.fixture(scope="module")
def two_rows(run, tmp_path_factory) -> bytes:
    """The partial file of a call that was interrupted after its first batch."""
    prompts = write_prompts(tmp_path_factory.mktemp("stopped"))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "complete", fake_complete)
        stop_before(patch, 2, interrupt)
        assert mc(patch, *words(run, prompts)) == 130
    return (prompts.parent / "out.jsonl.partial").read_bytes()


@pytest.fixture
def partial(prompts, two_rows) -> Path:
    path = prompts.parent / "out.jsonl.partial"
    path.write_bytes(two_rows)
    return path


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> list[bytes]:
    """The lines that the model itself draws for the first four prompts."""
    prompts = write_prompts(tmp_path_factory.mktemp("drawn"), 4)
    with pytest.MonkeyPatch.context() as patch:
        assert mc(patch, *words(run, prompts)) == 0
    return (prompts.parent / "out.jsonl").read_bytes().splitlines()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_output_resumes(run, tmp_path, drawn, monkeypatch, capsys, number, code):
    """The output equals an uninterrupted one: random streams depend on the row number."""
    prompts = write_prompts(tmp_path, 4)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    output, partial = (prompts.parent / f"out.jsonl{end}" for end in ("", ".partial"))
    try:
        with monkeypatch.context() as patch:
            stop_before(patch, 2, lambda: signal.raise_signal(number))
            assert mc(patch, *words(run, prompts)) == code
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out == ""
    message = f"2 of 4 rows are saved in {partial}"
    assert err == f"mc: interrupted: {message}: the same command resumes\n"
    assert not output.exists()
    assert partial.read_bytes().count(b"\n") == 3
    asked = stop_before(monkeypatch, -1, lambda: None)
    assert mc(monkeypatch, *words(run, prompts)) == 0
    assert capsys.readouterr().err.startswith(f"resuming {output}: {message}\n")
    assert asked == [2]
    assert output.read_bytes().splitlines() == drawn
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl", "out.jsonl"}


def test_nonfinite_logits_keep_finished_rows(run, prompts, fake, monkeypatch, capsys):
    """The error has the prompt. Without this prompt, the output resumes with the others."""

    def fail():
        raise NotFiniteError("prompts.jsonl: line 3: the logits are not finite")

    with monkeypatch.context() as patch:
        stop_before(patch, 2, fail)
        assert mc(patch, *words(run, prompts)) == 1
    err = capsys.readouterr().err
    assert "prompts.jsonl: line 3: the logits are not finite: 2 of 5 rows are saved in " in err
    assert err.count("\n") == 1
    lines = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:2] + lines[3:]) + line({"prompt": "and a line"}))
    assert mc(monkeypatch, *words(run, prompts)) == 0
    assert mc(monkeypatch, *words(run, prompts, "whole.jsonl")) == 0
    output, whole = (prompts.parent / f"{name}.jsonl" for name in ("out", "whole"))
    assert output.read_bytes() == whole.read_bytes()
    assert [json.loads(row).get("id") for row in output.read_text().splitlines()] == [
        0, 1, 3, 4, None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "rows", "size"), [(3, 2, 2), (3, 2, 1), (2, 1, 2), (1, 0, 2), (0, 0, 2)]
)
def test_incomplete_line_is_dropped(
    run, prompts, partial, whole, fake, monkeypatch, capsys, keep, rows, size
):
    """With the same or another batch size."""
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines, b'{"key": "ab"'][: keep + 1])[:-1])
    assert mc(monkeypatch, *words(run, prompts, "out.jsonl", "--batch-size", size)) == 0
    assert (f": {rows} of 5 rows are saved" in capsys.readouterr().err) == bool(rows)
    assert (prompts.parent / "out.jsonl").read_bytes() == whole


def edit(text: str) -> Callable[[Path, Path], object]:
    return lambda prompts, partial: prompts.write_text(text)


FIRST = line({"id": 0, "prompt": TEXTS[0]})


@pytest.mark.parametrize(
    ("more", "change", "message"),
    [
        (["--seed", 4], None, "has rows of other settings: seed was 3 and is 4: delete it"),
        (["--max-tokens", 7], None, "max_tokens was 6 and is 7"),
        (["--stop", "x"], None, 'stops was [] and is ["x"]'),
        (["--cache-dtype", "bfloat16"], None, 'cache_dtype was "float32" and is "bfloat16"'),
        (["seed1"], None, "has rows of other settings: model was "),
        ([], edit(FIRST), "has 2 rows for 1 prompts"),
        ([], edit(FIRST + line({"id": 1, "prompt": "x"})), "row 2 is of another prompt"),
        ([], edit(FIRST + line({"id": 9, "prompt": TEXTS[1]})), "row 2 is of another prompt"),
        ([], lambda _, partial: partial.write_text("x\n"), "not a partial output of mc generate"),
        ([], lambda _, partial: partial.write_text("[]\n"), "not a partial output of mc generate"),
    ],
)
def test_rows_of_other_settings_are_not_reused(
    run, prompts, partial, monkeypatch, capsys, more, change, message
):
    if change:
        change(prompts, partial)
    if more == ["seed1"]:
        run, more = run.with_name("seed1"), []
    before = partial.read_bytes()
    assert mc(monkeypatch, *words(run, prompts, "out.jsonl", *more)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(partial) in err
    assert err.count("\n") == 1
    assert partial.read_bytes() == before
    assert not (prompts.parent / "out.jsonl").exists()


def test_output_is_locked(run, prompts, monkeypatch, capsys):
    from train.evaluation.partial_output import Partial

    output = prompts.parent / "out.jsonl"
    with closing(Partial.lock(output)) as lock:
        lock.acquire()
        assert mc(monkeypatch, *words(run, prompts)) == 2
        err = capsys.readouterr().err
        assert f"{output}: in use by process " in err
        assert err.endswith(": use another --output\n")
        assert not output.exists()


def test_full_disk_keeps_finished_rows(tmp_path):
    from train.evaluation.partial_output import Partial

    settings, keys = {"seed": 0}, ["a", "b", "c"]
    partial = Partial(tmp_path / "out", settings, keys)
    partial.add([{"n": 1}])
    with full_disk(100), pytest.raises(OSError, match="File too large") as error:
        partial.add([{"n": "2" * 200}])
    assert error.value.filename == str(tmp_path / "out.partial")
    again = Partial(tmp_path / "out", settings, keys)
    assert again.rows == [{"n": 1}]
    again.add([{"n": 2}, {"n": "é\ud800"}])
    assert Partial(tmp_path / "out", settings, keys).rows == again.rows
    again.finish()
    rows = (tmp_path / "out").read_bytes().splitlines()
    assert [json.loads(row)["n"] for row in rows] == [1, 2, "é\ud800"]
    assert "é".encode() in rows[2]
    assert not partial.path.exists()


def test_other_keys_are_copied_to_the_output(run, fake, tmp_path, monkeypatch, capsys):
    rows = [
        {"id": 7, "prompt": TEXTS[0], "tags": ["é", None, {"x": 1.5}]},
        {"prompt": TEXTS[1], "s": "\ud800"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(map(line, rows)))
    assert mc(monkeypatch, "generate", run, "--prompts", prompts, *OPTIONS) == 0
    out = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [list(row) for row in out] == [[*row, "completion", "tokens", "finish"] for row in rows]
    for row, new in zip(rows, out, strict=True):
        assert row.items() <= new.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "tokens": 3}', 'line 1: key "tokens": is reserved for the output'),
        ('{"prompt": "a", "completion": ""}', 'key "completion": is reserved for the output'),
        ('{"prompt": "a", "x": NaN}', "line 1: Out of range float values are not JSON compliant"),
        ('{"prompt": "a", "x": 1e999}', "line 1: Out of range float values are not JSON compliant"),
        ('{"id": 1}', 'line 1: must be an object with the key "prompt"'),
    ],
)
def test_reserved_keys_are_refused(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_prompts(None, None, path)


def test_prompts_are_read_from_stdin(monkeypatch):
    data = io.BytesIO('{"prompt": "é"}\n'.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="ascii"))
    (prompt,) = read_prompts(None, None, Path("-"))
    assert prompt.text == "é".encode()
