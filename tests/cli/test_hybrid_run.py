"""Models with mixed blocks through the command line: training and inspection."""

import json

import pytest

from helpers.tiny_run import TINY, mc, write_config


def start(folder, monkeypatch, **model):
    config = write_config(folder, model=TINY["model"] | model)
    assert mc(monkeypatch, "train", config, "run.steps=3") == 0
    (folder / "text.txt").write_text("the code is 4711, and what was the code, then?\n")
    return folder / "runs" / "tiny"


@pytest.mark.slow
def test_hybrid_inspects_only_memory_blocks(tmp_path, monkeypatch, capsys):
    run = start(tmp_path, monkeypatch, num_layers=2, mixers=["window", "memory"], ffn_width=0)
    words = ["--text", tmp_path / "text.txt", "--json", run / "numbers.json", "--needle", "4711"]
    capsys.readouterr()
    assert mc(monkeypatch, "inspect", run, *words) == 0
    printed = capsys.readouterr().out
    found = json.loads((run / "numbers.json").read_text())
    assert found["blocks"] == [1]
    assert len(found["layers"]) == 1
    names = {path.name for path in (run / "inspect").iterdir()}
    assert names == {"inspect.html", "layer-1.png"}
    assert '<h2>Layer 1</h2>\n<img alt="layer 1"' in (run / "inspect" / "inspect.html").read_text()
    assert "in layer 1 head" in printed
    assert json.loads((run / "report.json").read_text())["model"] == "window, linear + grm"
    assert (run / "router.png").exists()


@pytest.mark.slow
def test_transformer_trains_but_cannot_be_inspected(tmp_path, monkeypatch, capsys):
    run = start(tmp_path, monkeypatch, mixers=["attention"])
    capsys.readouterr()
    assert mc(monkeypatch, "inspect", run, "--text", tmp_path / "text.txt") == 2
    error = capsys.readouterr().err
    assert "model.mixers = ['attention']: must have a 'memory' to inspect" in error.replace(
        "\n", " "
    )
    assert "Traceback" not in error
    assert not (run / "router.png").exists()
    assert mc(monkeypatch, "generate", run, "--prompt", "the code", "--max-tokens", "5") == 0
