"""The command line: output, and one-line errors with exit code 2."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from helpers.tiny_run import fails, mc, snapshot, write_config
from mc_core.files import write_atomic
from train.checkpoint import load_run
from train.config import load_config
from train.data.corpus import load_corpus
from train.evaluation.run_report import load_report, siblings
from train.optimizer import make_schedule
from train.tasks.recall import RecallTask


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The configuration of a finished run, and its output."""
    config = write_config(tmp_path_factory.mktemp("finished"))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        assert mc(patch, "train", config) == 0
    assert not err.getvalue()
    (config.parent / "stdout.txt").write_text(out.getvalue())
    return config


def test_run_prints_progress_and_a_table(finished):
    out = (finished.parent / "stdout.txt").read_text()
    assert "step 3/12  loss " in out
    assert "tokens/s" in out
    assert "s left" in out
    for words in ("tiny (linear + grm)", "uniform", "order-0", "xz -9", "bits/byte"):
        assert words in out
    assert "beats uniform by" in out
    assert "worse than xz -9 by" in out
    run = finished.parent / "runs" / "tiny"
    for name in ("curves.png", "router.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "validation_bits_per_byte" in row] == [6, 12]
    assert {"grad_norm", "learning_rate", "tokens_per_second", "seconds", "time"} <= rows[0].keys()
    rate = make_schedule(load_config(finished).optimizer, 12)  # of each step, counted from 0
    shown = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
    assert shown == {step: pytest.approx(float(rate(step - 1))) for step in shown}
    assert any((run / "tensorboard").glob("*.tfevents.*"))


def test_report_has_recall_and_dead_heads(finished, tmp_path):
    """On the first validation window; reports of earlier versions do not have them."""
    run = finished.parent / "runs" / "tiny"
    config, model, _, _ = load_run(run)
    tokens = load_corpus(config.data, config.model.vocab_size).validation_tokens()[:16]
    (trace,) = jax.jit(lambda tokens: model.inspect(tokens))(tokens[None].astype(np.int32))[1]
    report = load_report(run)
    np.testing.assert_allclose(report.heads.recall, trace.recall[0, :1], rtol=1e-5)
    assert report.heads.dead == np.asarray(trace.dead_heads).tolist()
    out = (finished.parent / "stdout.txt").read_text()
    assert "recall of cached memories" in " ".join(out.split())
    assert all(f"{recall:.3g}" in out for recall in report.heads.recall[0])
    data = json.loads((run / "report.json").read_text())
    del data["heads"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert load_report(tmp_path) == replace(report, heads=None)


@pytest.mark.parametrize("corpus", [pytest.param(False, marks=pytest.mark.slow), True])
def test_evaluation_has_the_recall_of_the_report(finished, tmp_path, monkeypatch, capsys, corpus):
    """On the first window of the validation text, or of the text of --corpus."""
    run, text = finished.parent / "runs" / "tiny", tmp_path / "text"
    config, _, _, _ = load_run(run)
    text.write_bytes(load_corpus(config.data, config.model.vocab_size).validation)
    files = [tmp_path / "x.json", tmp_path / "x.md"]
    words = ["--json", files[0], "--markdown", files[1], *(("--corpus", text) if corpus else ())]
    assert mc(monkeypatch, "evaluate", run, *words) == 0
    out, expected = capsys.readouterr().out, load_report(run).heads
    assert out.count("recall: share of a segment's inner loss") == 1
    assert "recall of cached memories" in " ".join(out.split())
    heads = json.loads(files[0].read_text())["heads"]
    np.testing.assert_allclose(heads["recall"], expected.recall, rtol=1e-5)
    assert heads["dead"] == expected.dead
    assert f"| 0 | {expected.recall[0][0]:.3g} " in files[1].read_text()


def test_finished_run_prints_its_report(finished, monkeypatch, capsys):
    before = snapshot(finished.parent / "runs")
    assert mc(monkeypatch, "train", finished) == 0
    out = capsys.readouterr().out
    assert out.strip() in (finished.parent / "stdout.txt").read_text()
    assert snapshot(finished.parent / "runs") == before


def test_evaluate_matches_the_report(finished, monkeypatch, capsys):
    run = finished.parent / "runs" / "tiny"
    assert mc(monkeypatch, "evaluate", run) == 0
    out = capsys.readouterr().out
    assert f"{load_report(run).bits_per_byte:.3f}" in out
    assert "tiny (linear + grm)" in out


@pytest.mark.slow
def test_runs_on_equal_text_share_a_table(finished, no_pictures, monkeypatch, capsys):
    run = finished.parent / "runs"
    words = [f"run.directory={run / 'twin'}", "model.layer.aggregation=none"]
    assert mc(monkeypatch, "train", finished, *words) == 0
    out = capsys.readouterr().out
    assert "twin (linear + none)" in out
    assert "tiny (linear + grm)" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.seed=1", "another config: run.seed was 0 and is 1"),
        ("optimizer.beta2=0.9", "another config: optimizer.beta2 was 0.95 and is 0.9"),
        ("model.layer.segment_size=4", "model.layer.segment_size was 8 and is 4"),
    ],
)
def test_checkpoint_of_another_config_is_refused(finished, monkeypatch, capsys, word, message):
    fails(finished, monkeypatch, capsys, message, "train", finished, word)


def test_other_config_is_found_before_the_corpus_is_read(finished, monkeypatch, capsys):
    monkeypatch.setattr("train.loop.load_task", lambda config: pytest.fail("reads the corpus"))
    fails(finished, monkeypatch, capsys, "another config", "train", finished, "run.seed=1")


def test_checkpoint_of_other_text_is_refused(finished, monkeypatch, capsys):
    document = finished.parent / "text" / "0.txt"
    text = document.read_bytes()
    document.write_text("changed")
    try:
        fails(finished, monkeypatch, capsys, "of other text", "train", finished)
    finally:
        document.write_bytes(text)


def test_keys_without_effect_on_training_may_change(finished, monkeypatch):
    assert mc(monkeypatch, "train", finished, "run.keep=5", "run.log_every=1") == 0


def test_unreadable_neighbour_reports_are_skipped(copied, monkeypatch):
    """A finished run must not fail because of other folders."""
    report = load_report(copied)
    contents = {"good": (copied / "report.json").read_bytes(), "cut": b"{", "binary": b"\xff"}
    for name, content in (contents | {"secret": b"{}"}).items():
        (copied.parent / name).mkdir()
        (copied.parent / name / "report.json").write_bytes(content)
    read = Path.read_text

    def refuse(path: Path, *args: object) -> str:
        if "secret" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert siblings(copied, report) == [report]
    assert RecallTask.load_report(copied.parent / "cut") is None


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run's folder."""
    return Path(shutil.copytree(finished.parent / "runs" / "tiny", tmp_path / "runs" / "tiny"))


@pytest.mark.parametrize("of_config", [True, False])
def test_checkpoint_of_another_version_is_refused(finished, copied, monkeypatch, capsys, of_config):
    """A key of the configuration or the metadata is unknown."""
    file = copied / "checkpoints" / "12" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    (meta["config"] if of_config else meta)["depth"] = 1
    file.write_text(json.dumps(meta))
    message = f"{copied} has a checkpoint of another version ("
    fails(finished, monkeypatch, capsys, message, "evaluate", copied)


def test_damaged_checkpoint_is_named(finished, copied, monkeypatch, capsys):
    (copied / "checkpoints" / "12" / "meta" / "metadata").unlink()
    fails(finished, monkeypatch, capsys, "12: cannot be read", "evaluate", copied)


@pytest.mark.parametrize("path", [".", "/", ".."])
def test_folder_is_not_overwritten(path):
    with pytest.raises(OSError, match=r"directory|busy") as refused:
        write_atomic(Path(path), b"")
    assert refused.value.filename == path


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.corpus=nowhere.txt", "nowhere.txt: no such file or folder"),
        ("data.corpus={folder}/empty.txt", "empty.txt: the file is empty"),
        ("data.corpus={folder}/short.txt", "needs at least 17: give more text or a smaller window"),
        ("data.tokenizer=nowhere.json", "data.tokenizer = nowhere.json"),
        ("run.directory={folder}/empty.txt", "empty.txt"),
        ("run.stesp=3", "run: unknown key 'stesp'"),
        ("run.steps=many", "run.steps = 'many': must be of type int"),
        ("steps", "must have the form key=value"),
    ],
)
def test_invalid_input_is_a_one_line_error(tmp_path, monkeypatch, capsys, word, message):
    config = write_config(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a short text")
    fails(config, monkeypatch, capsys, message, "train", config, word.format(folder=tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", [1, 2], "tiny.yaml: model = [1, 2]: must be a mapping"),
        ("data", [1], "tiny.yaml: data = [1]: must be a mapping"),
        ("run", [1], "tiny.yaml: has a list in place of a mapping of keys"),
        ("run", {"steps": 3, 1: 2, "x": 3}, "tiny.yaml: run: unknown key 1; allowed are "),
    ],
)
def test_sections_must_be_mappings(tmp_path, monkeypatch, capsys, key, value, message):
    config = write_config(tmp_path, **{key: value})
    fails(config, monkeypatch, capsys, message, "train", config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["train"], "Missing argument 'CONFIG'"),
        (["evaluate", "."], "no checkpoint found"),
        (["segments", "--length", "0"], "tokens = 0: must be >= 1"),
        (["segments", "--length", "x"], "'--length'"),
        (["segments", "--length", "3", "--segmentation", "x"], "'--segmentation'"),
        (["trian"], "No such command 'trian'"),
        ([], "Missing command"),
    ],
)
def test_invalid_commands_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert mc(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["typer", "jax"])
def test_missing_library_is_named(package):
    code = f"import sys; sys.modules['{package}'] = None; from train.__main__ import main; main()"
    command = [sys.executable, "-c", code, "train", "configs/demo.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"mc: {package} is not installed: pip install 'memory-caching-jax[train]'\n"
    )


def test_nan_stops_the_run_and_names_the_tensor(tmp_path, monkeypatch, capsys):
    """Parameters of about 1e38 overflow the next loss; the previous checkpoint remains the last."""
    config = write_config(tmp_path)
    words = ["optimizer.learning_rate=1e38", "optimizer.weight_decay=0.0", "run.save_every=1"]
    assert mc(monkeypatch, "train", config, *words) == 1
    err = capsys.readouterr().err
    assert "mc: step 2: gradient of blocks/0/" in err
    assert "is not finite (loss " in err
    assert "the last good checkpoint is step 1" in err
    assert err.count("\n") == 1
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["1"]


def test_segments_command(monkeypatch, capsys):
    assert mc(monkeypatch, "segments", "--length", 37, "--segmentation", "logarithmic") == 0
    assert mc(monkeypatch, "segments", "--length", 37, "--segment-size", 16) == 0
    assert capsys.readouterr().out == "32, 4, 1\n16, 16, 5\n"


def test_segments_command_prints_buckets(monkeypatch, capsys):
    """The buckets that the last token reads, largest and oldest first, and its own segment."""
    for length in (37, 64, 4):
        options = ("--segmentation", "fenwick", "--segment-size", 4)
        assert mc(monkeypatch, "segments", "--length", length, *options) == 0
    assert capsys.readouterr().out == "32, 4, 1\n32, 16, 8, 4, 4\n4\n"


def test_variants_command(monkeypatch, capsys):
    from mc_core.aggregations import AGGREGATIONS
    from mc_core.config import GATES, MIXERS, PRESETS, SEGMENTATIONS
    from mc_core.memories import MEMORIES

    assert mc(monkeypatch, "variants") == 0
    out = capsys.readouterr().out
    for name in (*MEMORIES, *AGGREGATIONS, *SEGMENTATIONS, *GATES, *MIXERS, *PRESETS):
        assert f" {name} " in out
    assert f"{len(MEMORIES) * 6} variants" in out
