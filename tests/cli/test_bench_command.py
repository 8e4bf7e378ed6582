"""Tables of `mc bench memory` and `mc bench decode`."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bench import decode
from helpers.tiny_run import TINY, mc, write_config
from mc_core.footprint import cache_footprint
from mc_jax.sharding import make_mesh, parameter_shardings


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Disable garbage collection, which takes longer than the tiny subjects."""
    monkeypatch.setattr("bench.timing.gc.collect", lambda: None)


def test_memory_table(tmp_path, monkeypatch, capsys):
    path = write_config(tmp_path)
    assert mc(monkeypatch, "bench", "memory", path, "--json", tmp_path / "m.json") == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1024, 4096, 16384, 65536, 262144]
    for row in rows:
        parts = row["state MiB"] + row["cached memories MiB"]
        assert row["cache MiB"] == pytest.approx(parts)
    assert "warning" not in capsys.readouterr().out


def test_memory_warns_if_larger_than_kv(tmp_path, monkeypatch, capsys):
    layer = TINY["model"]["layer"] | {"memory": {"kind": "titans"}, "segment_size": 16}
    path = write_config(tmp_path, model=TINY["model"] | {"layer": layer})
    assert mc(monkeypatch, "bench", "memory", path, "--tokens", 4096) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: a cached titans memory is larger" in out
    assert "smaller from segment_size = 17" in out


def test_memory_refuses_models_that_cannot_stream(tmp_path, monkeypatch, capsys):
    layer = TINY["model"]["layer"] | {"segmentation": "logarithmic"}
    path = write_config(tmp_path, model=TINY["model"] | {"layer": layer})
    assert mc(monkeypatch, "bench", "memory", path) == 2
    assert "logarithmic" in capsys.readouterr().err


@pytest.mark.slow
def test_decode_table(tmp_path, monkeypatch, capsys):
    words = "--width 8 --heads 2 --segment 4 --chunk 2 --context 16 --context 64 --runs 2"
    words += " --kind linear --aggregation grm --aggregation none --prompt 12"
    files = {"json": tmp_path / "d.json", "markdown": tmp_path / "d.md"}
    extra = [word for name, path in files.items() for word in (f"--{name}", path)]
    assert mc(monkeypatch, "bench", "decode", *words.split(), *extra) == 0
    result = json.loads(files["json"].read_text())
    layers = [(row["layer"], row["context"]) for row in result["rows"]]
    names = ("attention", "linear + grm", "linear + none")
    assert layers == [(name, context) for context in (16, 64) for name in names]
    notes = "\n".join(result["notes"])
    assert notes.count("in single steps") == 2
    assert "linear + grm, cached memories in bfloat16 on device" in notes
    assert "linear + none, cached" not in notes
    assert files["markdown"].read_text().count("| linear + grm |") == 2
    assert "linear + grm" in capsys.readouterr().out


@pytest.mark.slow
def test_prompt_equals_single_steps():
    config = decode.layer("titans", "grm", width=8, heads=2, segment_size=4, chunk_size=3)
    assert decode.compare_prefill(config, 14, 0)["difference"] < 1e-5


@pytest.mark.slow
def test_prompt_on_two_devices_equals_single_steps(tmp_path, monkeypatch):
    words = (
        "--width 8 --heads 2 --segment 4 --chunk 2 --context 16 --runs 1 --prompt 12 --devices 2"
    )
    words += " --kind titans --aggregation ssc --json"
    assert mc(monkeypatch, "bench", "decode", *words.split(), tmp_path / "d.json") == 0
    notes = json.loads((tmp_path / "d.json").read_text())["notes"]
    assert any("with its heads on 2 devices" in note for note in notes)
    config = decode.layer("titans", "ssc", width=8, heads=2, segment_size=4, chunk_size=3)
    row = decode.compare_prefill(config, 14, 0, jax.devices()[:2], runs=1)
    assert row["difference"] < 1e-5
    layer, _, params = decode._build(config, 0)
    mesh = make_mesh(data=1, heads=2, devices=jax.devices()[:2])
    split = jax.device_put(params, parameter_shardings(layer, mesh))
    split = nnx.merge(nnx.split(layer)[0], split)
    _, cache = split.extend(jnp.ones((1, 5, 8)), layer.init_cache(1, 8))
    sharding = cache.state.weights[0].sharding
    assert len(sharding.device_set) == 2


@pytest.mark.slow
def test_cost_of_bfloat16_cache():
    config = decode.layer("linear", "grm", width=8, heads=2, segment_size=4, chunk_size=3)
    exact, short, far = decode.compare_storage(config, 14, 0)
    assert exact["relative_error"] == 0
    assert far["relative_error"] < 1e-5 < short["relative_error"] < 1e-1
    assert 2 * short["memory_bytes"] == exact["memory_bytes"] == far["memory_bytes"]


@pytest.mark.parametrize(
    "word", ["--width 9", "--context 0", "--runs 0", "--kind square", "--devices 3"]
)
def test_invalid_decode_options_are_refused(monkeypatch, capsys, word):
    assert mc(monkeypatch, "bench", "decode", *word.split()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_decode_of_buckets_after_a_context(monkeypatch, tmp_path):
    """The cache has one slot per power of two, and a token reads one bucket per set bit."""
    path = tmp_path / "d.json"
    words = "--kind linear --aggregation grm --segmentation fenwick --width 8 --heads 2 --segment 4"
    words += f" --context 28 --runs 1 --prompt 0 --json {path}"
    assert mc(monkeypatch, "bench", "decode", *words.split()) == 0
    (row,) = [row for row in json.loads(path.read_text())["rows"] if row["layer"] != "attention"]
    assert row["layer"] == "linear + grm, fenwick"
    config = decode.layer(
        "linear",
        "grm",
        width=8,
        heads=2,
        segment_size=4,
        chunk_size=64,
        segmentation="fenwick",
    )
    assert row["read KiB"] == cache_footprint(config, 28).read / 2**10
    with pytest.raises(ValueError, match="'logarithmic': must be 'constant' or 'fenwick'"):
        decode.layer(
            "linear",
            "grm",
            width=8,
            heads=2,
            segment_size=4,
            chunk_size=4,
            segmentation="logarithmic",
        )
