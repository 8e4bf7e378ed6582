"""`mc sweep` on text: bits per byte, gains, and the shipped sweep."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from helpers.sweeps import write as write_recall
from helpers.text_sweeps import CONFIG, result
from helpers.tiny_run import TINY, mc, write_config
from mc_core.footprint import flops_per_token, model_parameters, state_bytes
from train.config import load_config
from train.evaluation.heads import HeadReport
from train.evaluation.run_report import TextReport
from train.sweeps import bits_per_byte as subject
from train.sweeps.accuracy_plot import draw_sweep
from train.sweeps.results import best, read_results
from train.sweeps.sweep_config import load_sweep, make_runs
from train.sweeps.table import by_row, make_table

ROOT = Path(__file__).parents[2]


def write(folder: Path, **keys: object) -> Path:
    """Write a base of 3 steps on text, and a sweep with `keys`."""
    run = TINY["run"] | {"steps": 3, "save_every": 3, "validate_every": 0}
    write_config(folder, run=run)
    sweep = {"base": "tiny.yaml", "directory": str(folder / "sweep")}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sweep | keys, sort_keys=False))
    return path


ROWS = [
    result("grm", 0, 3.0, 2.0),
    result("grm", 1, 3.2, 2.4),
    result("none", 0, 3.0, 2.5, cacheless=True),
    result("none", 1, 3.5, 3.0, cacheless=True),
]


def test_the_best_rate_has_the_fewest_bits():
    rows = [result("a", 0, bits, bits, rate=rate) for rate, bits in ((0.1, 3), (0.3, 2), (0.2, 2))]
    assert best(rows)["rate"] == 0.2
    failed = {"row": "a", "task": "text", "rate": 0.01, "seed": 0, "error": "step 3: ..."}
    assert best([failed, rows[0]])["rate"] == 0.1
    assert best([result("a", 0, np.nan, 1.0, rate=0.01), rows[0]])["rate"] == 0.1


def test_table_has_mean_range_and_gain_of_equal_seeds():
    grm, none = make_table("t", ROWS, CONFIG).rows
    assert (grm["bits/byte"], grm["lowest"], grm["highest"]) == ("2.6500", "2.5000", "2.8000")
    assert (none["bits/byte"], none["lowest"], none["highest"]) == ("3.0000", "2.7500", "3.2500")
    assert grm["gain"] == "+0.3500"
    assert "gain" not in none
    assert (grm["0-15"], grm["16-31"]) == ("3.1000", "2.2000")
    for key, value in (("parameters", 7), ("state", 100), ("FLOPs", 1000.0), ("s", 2.0)):
        assert grm[key] == value
    narrow = make_table("t", ROWS, CONFIG, cells=False)
    assert "parameters: 7 to 7" in narrow.notes
    assert "parameters" not in narrow.columns
    notes = make_table("t", [row | {"state_bytes": None} for row in ROWS], CONFIG).notes
    assert any("empty where segments cannot stream" in note for note in notes)
    # Seeds that the other row does not have are ignored.
    grm, none = make_table("t", ROWS[:3], CONFIG).rows
    assert grm["gain"] == "+0.2500"
    assert none["lowest"] is None


def test_gains_are_per_seed_and_position():
    whole, parts = subject.gains(ROWS[:2], ROWS[2:][::-1])
    np.testing.assert_allclose(whole, [0.25, 0.45])
    np.testing.assert_allclose(parts, [[0.0, 0.5], [0.3, 0.6]])


def test_rows_of_one_model_are_labelled_by_differences():
    """Labels must be shorter than folder names, to fit the table on a terminal."""
    many = {"kind": "dla", "data.window": 32}
    rows = by_row(
        [
            result("a", 0, 3.0, 2.0, model="dla", overrides=many | {"memory.step": 0.05}),
            result("b", 0, 3.0, 2.0, model="dla", overrides=many | {"memory.step": 0.3}),
            result("c", 0, 3.0, 2.0, model="dla", overrides=many, state_tokens=64),
            result("d", 0, 3.0, 2.0, model="dla + grm", overrides=many),
        ]
    )
    assert subject.models(rows) == {
        "a": "dla step=0.05", "b": "dla step=0.3", "c": "dla", "d": "dla + grm",
    }  # fmt: skip
    assert subject.names(rows)["b"] == "dla step=0.3 at 32"
    bare = rows["a"][0] | {"row": "e", "overrides": many}
    assert subject.models(rows | {"e": [bare]})["e"] == "dla"


def test_gain_compares_equal_memory_and_window():
    def row(name, cacheless, window, **overrides):
        return result(
            name, 0, 3.0, 2.0, cacheless=cacheless, state_tokens=window, overrides=overrides
        )

    rows = by_row(
        [
            row("a", False, 32, kind="linear", reads="grm"),
            row("b", False, 64, kind="titans", reads="grm"),
            row("c", True, 32, kind="titans", reads="none"),
            row("d", True, 32, kind="linear", reads="none"),
            row("e", True, 64, kind="titans", reads="none") | {"validation_sha256": "other"},
        ]
    )
    assert subject.baseline_of(rows["a"], rows) == rows["d"]
    assert subject.baseline_of(rows["b"], rows) is None
    assert subject.baseline_of(rows["c"], rows) is None


class Axes:
    """Data of the plot, by name of the line."""

    def __init__(self, monkeypatch):
        self.bands = []
        real = subject._band

        def band(axes, place, values, look, name):
            self.bands.append((axes.get_title() or "bits", name, [*place], values.copy()))
            real(axes, place, values, look, name)

        monkeypatch.setattr(subject, "_band", band)


def test_results_have_the_recall_of_each_head():
    scores = {"bits_per_byte": 2.0, "validation_bytes": 9, "validation_sha256": "x", "unit": "byte"}
    report = TextReport(
        "run", "titans", 1, 1, 1, 1.0, documents=(1, 1), references=None, positions=[], **scores
    )
    assert subject.measured_fields(report).keys() == {*scores, "positions"}
    heads = HeadReport(blocks=[1], recall=[[0.25, None]], dead=[[False, True]])
    found = subject.measured_fields(dataclasses.replace(report, heads=heads))
    assert found["recall"] == [[0.25, None]]
    assert found["dead"] == [[False, True]]


def test_plot_shows_bits_and_gain(monkeypatch):
    drawn = Axes(monkeypatch)
    failed = {
        "row": "bad", "task": "text", "model": "bad", "cacheless": False, "error": "step 3: ...",
        "rate": 0.1, "seed": 0, "state_bytes": 1, "flops_per_token": 1.0, "state_tokens": 32,
        "overrides": {},
    }  # fmt: skip
    assert draw_sweep("t", [*ROWS, failed]).startswith(b"\x89PNG")
    names = [(name, place) for _, name, place, _ in drawn.bands]
    places = [8.0, 24.0]
    assert names == [("grm at 32", places)] * 2 + [("none at 32", places)]
    np.testing.assert_allclose(drawn.bands[0][3], [[3.0, 2.0], [3.2, 2.4]])
    np.testing.assert_allclose(drawn.bands[1][3], [[0.0, 0.5], [0.3, 0.6]])
    line = make_table("t", [*ROWS, failed], CONFIG).rows[-1]
    assert line["failed"] == 1
    assert "bits/byte" not in line


AGGREGATIONS = {"model.layer.aggregation": ["none", "grm"]}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("vary", "rates", "count"),
    [
        (AGGREGATIONS, [0.01], 4),
        pytest.param(
            AGGREGATIONS | {"data.window": [16, 24]}, [0.01, 0.001], 12, marks=pytest.mark.slow
        ),
    ],
    ids=["reads", "reads-windows-rates"],
)
def test_text_sweep_trains_scores_and_plots(vary, rates, count, tmp_path, monkeypatch, capsys):
    path = write(tmp_path, vary=vary, rates=rates, seeds=[0, 1])
    markdown, plot = tmp_path / "table.md", tmp_path / "x.png"
    assert mc(monkeypatch, "sweep", path, "--markdown", markdown, "--plot", plot) == 0
    out = capsys.readouterr().out
    rows = read_results(tmp_path / "sweep")
    assert len(rows) == count
    for row in rows:
        window = row["overrides"].get("data.window", 16)
        folder = tmp_path / "sweep" / row["row"] / f"rate={row['rate']:g},seed={row['seed']}"
        report = json.loads((folder / "report.json").read_text())
        assert row["bits_per_byte"] == report["bits_per_byte"]
        assert row["positions"] == report["positions"]
        assert row["positions"][-1]["end"] == row["state_tokens"] == window
        words = [f"{key}={value}" for key, value in row["overrides"].items()]
        model = load_config(tmp_path / "tiny.yaml", words).model
        assert row["flops_per_token"] == flops_per_token(model, window)
        assert row["state_bytes"] == state_bytes(model, window)
        assert row["parameters"] == model_parameters(model)
        assert row["cacheless"] == (row["overrides"]["model.layer.aggregation"] == "none")
    first = [r for r in rows if r["row"] == rows[0]["row"] and r["seed"] == 0]
    (second,) = (r for r in rows if r["row"] == rows[0]["row"] and r["seed"] == 1)
    assert second["rate"] == min(first, key=lambda r: r["bits_per_byte"])["rate"]
    written = markdown.read_text()
    assert "fewest bits per byte" in written
    assert "| gain |" in written
    assert f"{rows[0]['bits_per_byte']:.4f} bits per byte" in out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_nan_text_run_is_a_failed_result(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, rates=[1e38], rows=[{"optimizer.weight_decay": 0.0}])
    assert mc(monkeypatch, "sweep", path) == 0
    (row,) = read_results(tmp_path / "sweep")
    assert "is not finite" in row["error"]
    assert "is not finite" in capsys.readouterr().out


def test_invalid_text_sweeps_are_refused(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, examples=4)
    assert mc(monkeypatch, "sweep", path) == 2
    err = capsys.readouterr().err
    assert "examples = 4: not supported for text" in err
    mixed = write_recall(
        tmp_path,
        vary={"model.layer.d_model": [8]},
        rows=[{"data.task": "text", "data.corpus": "x"}],
    )
    text = yaml.safe_load(mixed.read_text())
    del text["examples"]
    mixed.write_text(yaml.safe_dump(text))
    assert mc(monkeypatch, "sweep", mixed) == 2
    err = capsys.readouterr().err
    assert "data.task = mqar, text: must be the same in all rows" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_shipped_text_sweep_matches_parameters_and_bytes():
    """Parameters within 2%, the same trained bytes, and each model at both windows."""
    sweep = load_sweep(ROOT / "configs" / "text" / "sweep.yaml")
    configs = [run.config for (run,) in make_runs(sweep).values()]
    sizes = [model_parameters(config.model) for config in configs]
    assert max(sizes) / min(sizes) < 1.02
    trained = {
        config.run.steps * config.run.batch_size * config.run.accumulation * config.data.window
        for config in configs
    }
    assert len(trained) == 1
    rows = {(config.model.name, config.data.window) for config in configs}
    kinds = [*(f"titans + {reads}" for reads in ("none", "grm", "ssc", "soup")), "attention"]
    assert rows == {(kind, window) for kind in kinds for window in (512, 2048)}
    assert len(configs) == len(rows)
    assert sweep.seeds == (0, 1, 2)
    demo = load_config(ROOT / "configs" / "demo.yaml")
    assert {config.data.corpus for config in configs} == {demo.data.corpus}
    assert len({config.optimizer for config in configs}) == 1
    layers = [config.model.layer for config in configs if config.model.name != "attention"]
    modes = {(layer.aggregation == "none", layer.state_init_mode) for layer in layers}
    assert modes == {(True, "checkpoint"), (False, "restart")}


def test_recorded_is_refused_for_text(tmp_path, monkeypatch, capsys):
    path = write(tmp_path)
    (tmp_path / "r.jsonl").write_text("")
    assert mc(monkeypatch, "sweep", path, "--recorded", tmp_path / "r.jsonl") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--recorded" in line
    assert "data.task = 'text'" in line
