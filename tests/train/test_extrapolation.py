"""`python -m tools.extrapolation`: means over seeds of `mc evaluate --lengths`."""

import json
import sys
from pathlib import Path

import pytest

from tools.extrapolation import collect, main


def write_report(folder: Path, seed: int, bits: dict[str, dict[int, float]], text: str = "a"):
    """Write the numbers of one run: bits per byte by changes of the model and by length."""
    models = [
        {
            "overrides": changes.split(),
            "lengths": [
                {"length": length, "bits_per_byte": value} for length, value in rows.items()
            ],
        }
        for changes, rows in bits.items()
    ]
    path = folder / f"{seed}.json"
    run = f"runs/x/linear/seed={seed}"
    path.write_text(json.dumps({"run": run, "sha256": text, "models": models}))
    return path


def test_table_has_means_and_ranges_over_seeds(tmp_path, monkeypatch, capsys):
    change = "model.layer.aggregation=mean"
    files = [
        write_report(tmp_path, 0, {"": {512: 2.0, 1024: 3.0}, change: {512: 2.0, 1024: 2.5}}),
        write_report(tmp_path, 1, {"": {512: 2.2, 1024: 3.5}, change: {512: 2.1, 1024: 2.7}}),
    ]
    plot, record = tmp_path / "x.png", tmp_path / "x.jsonl"
    outputs = ["--plot", str(plot), "--record", str(record)]
    monkeypatch.setattr(sys, "argv", ["extrapolation", *map(str, files), *outputs])
    main()
    out = capsys.readouterr().out
    assert "| linear | as trained | 2.100 (2.000-2.200) | 3.250 (3.000-3.500) |" in out
    assert f"| linear | {change} | 2.050 (2.000-2.100) | 2.600 (2.500-2.700) |" in out
    assert "mean of 2 seeds" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert collect(lines) == collect([json.loads(file.read_text()) for file in files])


def test_different_texts_are_refused(tmp_path):
    files = [write_report(tmp_path, i, {"": {512: 2.0}}, text) for i, text in enumerate("ab")]
    with pytest.raises(ValueError, match="the reports score different texts"):
        collect([json.loads(file.read_text()) for file in files])
