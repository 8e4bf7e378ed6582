"""`mc demo` on a tiny sweep."""

import re

import numpy as np
import pytest
import yaml

from helpers.tiny_run import TINY, mc
from train.config import NIAHConfig
from train.demo import find_value
from train.tasks.niah import Needles

DATA = {"task": "niah", "haystack": "noise", "value": "number", "lengths": [160], "depths": 4}
ROWS = [{"model.layer.aggregation": "none"}, {"model.layer.aggregation": "grm"}]


def write(folder, data=DATA, rows=ROWS):
    base = TINY | {"data": data, "optimizer": {"warmup_steps": 1}}
    base["run"] = {"steps": 2, "batch_size": 2, "save_every": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    sweep = {"base": "base.yaml", "directory": str(folder / "runs"), "rows": rows, "examples": 1}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


@pytest.mark.slow
def test_demo_prints_recall_and_draws_the_gates(tmp_path, monkeypatch, capsys):
    assert mc(monkeypatch, "demo", write(tmp_path)) == 0
    out = capsys.readouterr().out
    for words in ("without a cache +0.0%", "with a cache +0.0%", "attention's KV cache"):
        assert re.search(rf"{words}.* kB", out), words
    share = re.search(r"gives (\d+)% of its weight to the (\d) of 21 memories .* give (\d+)%", out)
    assert share  # 20 segments of 8 tokens, and the online memory
    assert int(share[3]) == round(100 * int(share[2]) / 21)
    assert (tmp_path / "runs" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_value_is_found_behind_the_needle():
    data = NIAHConfig(haystack="noise", value="number", lengths=(160,), depths=4)
    example = Needles(data, 256, 0).draw(160, 1)("test", 0)
    place = find_value(example)
    value = example.labels[example.weights > 0]
    assert bytes(example.tokens[place : place + len(value)].tolist()) == bytes(value.tolist())
    assert place > example.origins[0]
    changed = example._replace(tokens=np.zeros_like(example.tokens))
    assert find_value(changed) == example.origins[0]


@pytest.mark.parametrize(
    ("data", "rows", "message"),
    [
        (DATA, ROWS[1:], "must have two rows, without and with a cache"),
        ({"task": "mqar", "vocab_size": 64, "lengths": [[16, 2]]}, ROWS, "must be 'niah'"),
    ],
)
def test_other_sweeps_are_refused(tmp_path, monkeypatch, capsys, data, rows, message):
    assert mc(monkeypatch, "demo", write(tmp_path, data, rows)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
