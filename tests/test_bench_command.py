"""The commands that measure: what they say, not how fast it was."""

import json

import pytest
from tiny import TINY, mc, write_config


def test_memory(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    assert mc(monkeypatch, "bench", "memory", path, "--json", tmp_path / "m.json") == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1024, 4096, 16384, 65536, 262144]
    assert all(row["cache_bytes"] == row["state_bytes"] + row["cached_bytes"] for row in rows)
    assert "warning" not in capsys.readouterr().out


def test_memory_warns_of_memories_that_outgrow_kv(tmp_path, monkeypatch, capsys):
    layer = TINY["model"]["layer"] | {"memory": {"kind": "titans"}, "segment_size": 16}
    path = write_config(tmp_path, model=TINY["model"] | {"layer": layer})
    assert mc(monkeypatch, "bench", "memory", path, "--tokens", 4096) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: a cached titans memory is larger" in out
    assert "from segment_size = 17 on" in out


def test_memory_of_what_cannot_stream(tmp_path, monkeypatch, capsys):
    layer = TINY["model"]["layer"] | {"segmentation": "logarithmic"}
    path = write_config(tmp_path, model=TINY["model"] | {"layer": layer})
    assert mc(monkeypatch, "bench", "memory", path) == 2
    assert "logarithmic" in capsys.readouterr().err


def test_decode(tmp_path, monkeypatch, capsys):
    words = "--width 8 --heads 2 --segment-size 4 --chunk-size 2 --context 16 --context 64 --runs 2"
    words += " --kind linear --aggregation grm --aggregation none --prefill 12"
    files = {"json": tmp_path / "d.json", "markdown": tmp_path / "d.md"}
    extra = [word for name, path in files.items() for word in (f"--{name}", path)]
    assert mc(monkeypatch, "bench", "decode", *words.split(), *extra) == 0
    result = json.loads(files["json"].read_text())
    layers = {row["layer"] for row in result["decode"]}
    assert layers == {"attention", "linear + grm", "linear + none"}
    assert {row["context"] for row in result["decode"]} == {16, 64}
    assert [row["difference"] < 1e-5 for row in result["prefill"]] == [True, True]
    errors = {(row["cache_dtype"], row["cache_device"]): row for row in result["storage"]}
    assert errors["float32", "host"]["relative_error"] < 1e-5
    short, long = errors["bfloat16", "device"], errors["float32", "device"]
    assert 2 * short["memory_bytes"] == long["memory_bytes"]
    assert 1e-5 < short["relative_error"] < 1e-1
    assert files["markdown"].read_text().count("\n") == 2 + len(result["decode"])
    assert "linear + grm" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["--width 9", "--context 0", "--runs 0", "--kind square"])
def test_bad_options(monkeypatch, capsys, word):
    assert mc(monkeypatch, "bench", "decode", *word.split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
