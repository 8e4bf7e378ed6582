"""A run's copy of its tokenizer and its hash, checked by every command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from helpers.tiny_run import TINY, fails, mc, snapshot, write_config
from helpers.tokenizer_files import TEXT, byte_level, words
from mc_core.errors import UserError
from mc_jax import LanguageModel
from train.checkpoint import load_run
from train.config import load_config
from train.data.encoded_text import read_text
from train.evaluation.sample import Sample

WORDS = [
    "data.tokenizer=plain.json",
    "run.steps=3",
    "run.validate_every=0",
    "run.sample_tokens=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The configuration of a run of two steps on the tokens of a file, relative to its folder."""
    folder = tmp_path_factory.mktemp("made")
    byte_level().save(str(folder / "plain.json"))
    model = TINY["model"] | {"vocab_size": 300, "mixers": ["attention"]}
    config = write_config(folder, model=model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # Shows which file decodes the final sample.
        patch.setattr(
            "train.tasks.text.draw_sample",
            lambda model, config, _: Sample("", config.tokenizer, ""),
        )
        assert mc(patch, "train", config, *WORDS) == 0
    return config


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of the run, its configuration and its tokenizer, as working directory."""
    copy = Path(shutil.copytree(made.parent, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


def edit(path: Path) -> None:
    """Swap two tokens of a tokenizer file."""
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    path.write_text(json.dumps(data))


def source(run: Path, *tokenizer: str) -> tuple[LanguageModel, Tokenizer]:
    from train.evaluation.generate import load_source

    return load_source(run, *(tokenizer or (None,)))


@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_run_reads_its_tokenizer_copy(folder, tmp_path, monkeypatch, change):
    """The original file may change, be deleted or be unreadable, and the run may be moved."""
    run, original = folder / "runs" / "tiny", byte_level()
    assert (run / "tokenizer.json").read_bytes() == (folder / "plain.json").read_bytes()
    sample = json.loads((run / "report.json").read_text())["sample"]
    assert sample["text"].endswith("runs/tiny/tokenizer.json")
    change(folder / "plain.json")
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    _, tokenizer = source(moved)
    assert tokenizer.get_vocab() == original.get_vocab()
    config = load_run(moved)[0]
    (tmp_path / "text.txt").write_text(TEXT)
    tokens = read_text(tmp_path / "text.txt", config).tokens
    assert tokens.tolist() == original.encode(TEXT).ids
    assert source(Path("elsewhere"), str(moved / "tokenizer.json"))[1] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit, "tokenizer.json (SHA-256 {other}) is not the tokenizer that "),
        (Path.unlink, "tokenizer.json: no such file: this is the run's copy of data.tokenizer = "),
    ],
)
def test_changed_tokenizer_copy_is_refused(folder, monkeypatch, capsys, change, message):
    from train.data.tokenizer_copy import hash_of

    run, text = folder / "runs" / "tiny", folder / "text" / "0.txt"
    copy = run / "tokenizer.json"
    change(copy)
    other = hash_of(str(copy))[:12] if copy.exists() else ""
    for command in (
        ("generate", run, "--prompt", "a"),
        ("evaluate", run),
        ("evaluate", run, "--corpus", text),
        ("evaluate", run, "--task", "niah"),
        ("inspect", run, "--text", text),
    ):
        line = message.format(other=other)
        fails(folder / "tiny.yaml", monkeypatch, capsys, line, *command)
    # --tokenizer may be used instead, and converting weights needs no tokenizer.
    assert source(run, "plain.json")[1].get_vocab() == byte_level().get_vocab()
    load_run(run, needs_text=False)


def test_another_tokenizer_is_refused(folder, monkeypatch, capsys):
    run = folder / "runs" / "tiny"
    edit(folder / "plain.json")
    for name, shown in (("plain.json", "SHA-256"), ("bytes", "bytes")):
        words = ("generate", run, "--prompt", "a", "--tokenizer", name)
        message = f"--tokenizer {name} ({shown}"
        fails(folder / "tiny.yaml", monkeypatch, capsys, message, *words)


def test_run_resumes_only_with_the_same_tokenizer(folder, monkeypatch, capsys):
    """An edited file is refused, and the message has both hashes. The path may change."""
    config, run = folder / "tiny.yaml", folder / "runs" / "tiny"
    words = [*WORDS, f"run.directory={run}"]
    (folder / "same.json").write_bytes((folder / "plain.json").read_bytes())
    before = snapshot(run)
    assert mc(monkeypatch, "train", config, *words, "data.tokenizer=same.json") == 0
    assert snapshot(run) == before
    capsys.readouterr()
    # Change only the decoder: the tokens of the corpus are unchanged.
    data = json.loads((folder / "plain.json").read_text())
    (folder / "plain.json").write_text(json.dumps(data | {"decoder": None}))
    message = f"was trained with {run}/tokenizer.json (SHA-256 "
    fails(config, monkeypatch, capsys, message, "train", config, *words)
    fails(config, monkeypatch, capsys, "data.tokenizer = plain.json", "train", config, *words)
    (folder / "plain.json").unlink()
    message = f"no such file; the run has a copy: set data.tokenizer={run}/tokenizer.json"
    fails(config, monkeypatch, capsys, message, "train", config, *words)
    kept = f"data.tokenizer={run}/tokenizer.json"
    assert mc(monkeypatch, "train", config, *words, kept) == 0


def test_run_without_copy_reads_the_named_file(folder, monkeypatch, capsys):
    run = folder / "runs" / "tiny"
    (run / "tokenizer.json").unlink()
    file = run / "checkpoints" / "3" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["tokenizer"]
    file.write_text(json.dumps(meta))
    assert source(run)[1].get_vocab() == byte_level().get_vocab()
    (folder / "plain.json").rename(folder / "moved.json")
    message = "data.tokenizer = plain.json: no such file, and the run has no copy of it"
    fails(folder / "tiny.yaml", monkeypatch, capsys, message, "generate", run, "--prompt", "a")
    assert source(run, "moved.json")[1].get_vocab() == byte_level().get_vocab()


def test_weight_file_has_its_tokenizer_hash(folder, tmp_path, monkeypatch, capsys):
    """`mc convert` writes the hash; another tokenizer or bytes are refused, also for a new run."""
    run, path = folder / "runs" / "tiny", tmp_path / "model.safetensors"
    # Whether the outputs are the same is tested elsewhere, and takes seconds.
    monkeypatch.setattr("parity.convert.outputs", lambda *model: np.ones(1))
    assert mc(monkeypatch, "convert", run, path) == 0
    assert f"keep {run}/tokenizer.json" in " ".join(capsys.readouterr().out.split())
    assert source(path, "plain.json")[1].get_vocab() == byte_level().get_vocab()
    with pytest.raises(UserError, match=r"has 300 tokens, and declares only its SHA-256"):
        source(path)
    edit(folder / "plain.json")
    for name in ("plain.json", "bytes"):
        with pytest.raises(UserError, match=rf"--tokenizer {name} .*is not the tokenizer that"):
            source(path, name)
    config = folder / "tiny.yaml"
    base = config.read_text()
    config.write_text(base.replace("data:\n", "data:\n  tokenizer: plain.json\n"))
    words = ("convert", path, tmp_path / "new", "--config", config)
    fails(config, monkeypatch, capsys, "data.tokenizer = plain.json (SHA-256", *words)


def test_bytes_need_no_copy(tmp_path):
    from parity.files import write_safetensors
    from parity.weights import jax_weights, to_torch
    from train.convert import tokenizer_of, write_run

    config = load_config(write_config(tmp_path))
    weights = jax_weights(LanguageModel(config.model, rngs=nnx.Rngs(0)))
    write_run(tmp_path / "run", config, weights)
    assert not (tmp_path / "run" / "tokenizer.json").exists()
    assert tokenizer_of(tmp_path / "run", "run") == "bytes"
    assert source(tmp_path / "run")[1] is None
    path = tmp_path / "model.safetensors"
    write_safetensors(path, config.model, to_torch(weights), "bytes")
    assert source(path)[1] is None
    byte_level().save(str(tmp_path / "t.json"))
    for what in (path, tmp_path / "run"):
        with pytest.raises(UserError, match=r"is not the tokenizer that .*\(bytes\)"):
            source(what, str(tmp_path / "t.json"))


def test_sweep_refuses_results_of_another_tokenizer(tmp_path):
    from train.sweeps.results import Results
    from train.sweeps.sweep_config import SweepConfig, make_runs

    words("a", "b").save(str(tmp_path / "t.json"))
    write_config(tmp_path)
    rows = ({"data.tokenizer": str(tmp_path / "t.json")},)
    sweep = SweepConfig(tmp_path / "tiny.yaml", str(tmp_path / "sweep"), rows=rows)
    ((run,),) = make_runs(sweep).values()
    results = Results(tmp_path / "sweep")
    row = {"row": run.row, "seed": run.seed, "rate": run.rate, "fingerprint": run.fingerprint}
    results.add(row | {"tokenizer": run.tokenizer})
    assert results.find(run) is not None
    words("b", "a").save(str(tmp_path / "t.json"))
    ((run,),) = make_runs(sweep).values()
    with pytest.raises(UserError, match=r"another tokenizer .*t\.json"):
        results.find(run)
