"""Tables and plots of a sweep: labels, FLOPs and recorded results."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

from helpers.sweeps import Trained, result, write
from helpers.tiny_run import mc
from mc_core.footprint import flops_per_token, state_bytes
from train.config.yaml_files import read_yaml
from train.sweeps import accuracy_plot
from train.sweeps.accuracy_plot import Legend, RowStyle, draw_sweep
from train.sweeps.labels import label
from train.sweeps.plan import runs_of_row
from train.sweeps.recorded import read_recorded
from train.sweeps.results import key_of, read_file
from train.sweeps.sweep import max_example_tokens
from train.sweeps.sweep_config import SweepConfig, load_sweep, make_run, make_runs
from train.sweeps.table import for_terminal, make_table

READ = cache(read_yaml)  # each run reads the files on which its own is based
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "mqar"
RECORDED = ROOT / "docs" / "evidence"
MQAR = ("ablation", "defaults", "segments", "widths", "writes")
CONFIG = SweepConfig(Path("x"), "y", rates=(0.1,))


def rows_of(path: Path) -> list[dict]:
    """Return fake results of all rows of a sweep."""
    return [
        result(0.1, row=row, overrides=runs[0].overrides, state_bytes=2**i, flops_per_token=5e4)
        for i, (row, runs) in enumerate(make_runs(load_sweep(path)).items())
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"layer.memory.kind": "titans", "layer.memory.expansion": 1}, "titans expansion=1"),
        ({"model.mixers": ["attention"]}, "attention"),
        ({"model.mixers": ["window", "memory"]}, "window+memory"),
        ({"layer.use_q_as_u": True, "data.lengths": [[8, 2]]}, "use_q_as_u=true lengths=[[8, 2]]"),
        ({"model.layer.softmax_temperature": 0.25}, "softmax_temperature=0.25"),
        ({}, "base"),
    ],
)  # fmt: skip
def test_labels_show_numbers_with_their_key(overrides, words):
    assert label({"overrides": overrides}) == words


def test_flops_have_a_common_unit():
    few, many = result(0.1, flops_per_token=20_500.0), result(0.1, row="b", flops_per_token=2.5e6)
    (line,) = make_table("t", [few], CONFIG).rows
    assert line["kFLOP"] == 20.5
    lines = make_table("t", [few, many], CONFIG, cells=False).rows
    assert [line["MFLOP"] for line in lines] == [0.0205, 2.5]
    assert "kFLOP" not in make_table("t", [result(0.1)], CONFIG).columns


def test_first_column_is_not_truncated(capsys):
    from rich.console import Console

    rows = rows_of(CONFIGS / "sweep.yaml")
    table = for_terminal(make_table("t", rows, CONFIG, cells=False))
    Console(width=80).print(table)
    out = capsys.readouterr().out
    assert "…" not in out
    words = {word for row in rows for word in label(row).split()}
    assert words <= set(out.split())


def line_of(run, accuracy):
    own = {"row": run.row, "overrides": run.overrides, "fingerprint": run.fingerprint}
    return json.dumps(result(run.rate, run.seed, accuracy, **own)) + "\n"


def test_recorded_accuracy_is_a_column(tmp_path, monkeypatch, capsys):
    """Only recorded runs with the rates and seeds of the sweep are used, at the best rate."""
    vary, width = {"vary": {"model.layer.d_model": [8, 16, 32]}}, "d_model"
    larger = load_sweep(write(tmp_path, **vary, rates=[0.1, 0.2, 0.3], seeds=[0, 1, 2]))
    lines = []
    for row, runs in [*make_runs(larger).items()][:2]:
        for run in runs:
            lines.append(line_of(run, {0.1: 0.3, 0.2: 0.6, 0.3: 0.9}[run.rate]))
            for seed in (1, 2) if row == f"{width}=8" else ():
                other_seed = make_run(larger, row, run.overrides, seed, run.rate)
                lines.append(line_of(other_seed, {1: 0.8, 2: 0.1}[seed]))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines))
    path = write(tmp_path, **vary, rates=[0.1, 0.2], seeds=[0, 1])
    Trained(monkeypatch, lambda run: 0.5)
    markdown = tmp_path / "table.md"
    assert mc(monkeypatch, "sweep", path, "--recorded", other, "--markdown", markdown) == 0
    out = capsys.readouterr().out
    assert f"recorded: accuracy of the runs with these rates and seeds in {other}" in out
    assert "another configuration" not in out
    header, *rows = re.findall(r"(?m)^\| ([^-].*) \|$", markdown.read_text())
    at = header.split(" | ").index("recorded %")
    cells = [row.split(" | ")[at].strip() for row in rows]
    assert cells == ["70", "60", ""]

    # Equal names with other settings are reported.
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("steps: 3", "steps: 4"))
    config = load_sweep(path)
    recorded = read_recorded(other, config, make_runs(config))
    assert recorded.notes[1:] == [f"recorded with another configuration: {width}=8; {width}=16"]


def test_failed_recorded_run_is_an_empty_cell(tmp_path):
    config = load_sweep(write(tmp_path))
    first = make_runs(config)
    (run,) = first["base"]
    file = tmp_path / "other.jsonl"
    failed = json.loads(line_of(run, 0.5)) | {"error": "step 2: a NaN"}
    file.write_text(json.dumps(failed) + "\n")
    recorded = read_recorded(file, config, first)
    assert recorded.rows == {}
    assert recorded.notes == [f"recorded: no matching rows in {file}"]


def test_table_names_versions_and_machines():
    """Finished runs keep their recorded versions after an upgrade."""
    old, new = ({"jax": number, "flax": "0.1"} for number in ("0.7", "0.8"))
    rows = [result(0.1, versions=old), result(0.1, row="b", versions=new)]
    notes = make_table("t", rows, CONFIG).notes
    assert "runs: made with jax 0.7 flax 0.1; jax 0.8 flax 0.1" in notes
    assert "runs: made with jax 0.8 flax 0.1" in make_table("t", rows[1:] * 2, CONFIG).notes
    rows += [result(0.1, machine={"cores": cores, "NPROC": "1"}, versions=new) for cores in (1, 2)]
    words = "made with jax 0.8 flax 0.1, on cores 1, NPROC 1; cores 2, NPROC 1"
    assert f"runs: {words}" in make_table("t", rows[2:], CONFIG).notes
    assert f"runs: {words}; others not recorded" in make_table("t", rows[1:], CONFIG).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "other.jsonl: No such file or directory"),
        ("{}\n", "other.jsonl: line 1 is not a result of a run: 'row'"),
        ("3\n", "other.jsonl: line 1 is not a result of a run: "),
        ('{"row": [], "seed": 0, "rate": 0.01, "fingerprint": ""}\n', "not a result of a run"),
        ('{"row": "base", "seed": 0, "rate": 0.01}\n', "result of a run: 'fingerprint': correct"),
        ('{"row": "base", "seed": 0, "rate": 0.01, "fingerprint": ""}\n', "base has no accuracy"),
        ("\x89PNG\r\n", "other.jsonl: line 1 is not a result of a run: "),
    ],
)  # fmt: skip
def test_invalid_recorded_files_stop_before_training(tmp_path, monkeypatch, capsys, text, message):
    file = tmp_path / "other.jsonl"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    trained = Trained(monkeypatch, lambda run: 0.5)
    assert mc(monkeypatch, "sweep", write(tmp_path), "--recorded", file) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert trained == []
    assert not (tmp_path / "sweep").exists()


def test_rows_of_shipped_sweep_have_distinct_styles():
    row_styles = [RowStyle.of(row) for row in rows_of(CONFIGS / "sweep.yaml")]
    legend = Legend(row_styles)
    styles = [json.dumps(legend.style(row_style)) for row_style in row_styles]
    assert len(set(styles)) == len(styles) == 45
    words = [handle.get_label() for handle in legend.handles()]
    assert sorted(words) == sorted(
        ["linear", "swla", "dla expansion=1 step=0.3", "titans expansion=1 step=0.1", "attention"]
        + ["none", "residual", "grm", "soup", "ssc", "mean", "checkpoint", "restart"]
    )


@pytest.mark.parametrize("widths", [(8,), (8, 16, 32)])
def test_plots_of_one_and_several_widths(widths):
    rows = [
        result(0.1, row=f"{row['row']},d_model={width}", width=width, state_bytes=width * 100,
               overrides=row["overrides"] | {"model.layer.d_model": width})
        for row in rows_of(CONFIGS / "evidence.yaml") for width in widths
    ]  # fmt: skip
    row_styles = {RowStyle.of(row) for row in rows}
    assert len(row_styles) == 5  # widths are x positions of a line
    failed = result(0.1, row="z", error="step 2: a NaN")
    assert draw_sweep("t", [*rows, failed]).startswith(b"\x89PNG")
    assert draw_sweep("t", [failed]).startswith(b"\x89PNG")


def test_plot_names_the_tokens_of_the_state(monkeypatch):
    monkeypatch.setattr(accuracy_plot, "to_png", lambda figure: figure)
    figure = draw_sweep("t", [result(0.1, state_tokens=24), result(0.1, row="b", state_tokens=48)])
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["aggregation", "KiB of a stream's state after 48 tokens"]


def test_row_that_cannot_stream_has_no_state(monkeypatch):
    monkeypatch.setattr(accuracy_plot, "to_png", lambda figure: figure)
    rows = [result(0.1), result(0.1, row="b", state_bytes=None)]
    table = make_table("t", rows, CONFIG)
    assert [line["state"] for line in table.rows] == [100, None]
    assert any(note.endswith("; empty where segments cannot stream") for note in table.notes)
    left, right = draw_sweep("t", rows).axes
    assert sum(len(line.get_xdata()) for line in left.lines) == 2
    assert sum(len(line.get_xdata()) for line in right.lines) == 1


@pytest.mark.parametrize(("task", "sweep", "rows"), [("mqar", "recall", 5), ("niah", "sweep", 2)])
def test_evidence_is_a_subset_of_the_sweep(task, sweep, rows):
    """Rows have the same names, keys and fingerprints."""
    folder = ROOT / "configs" / task
    part, whole = (load_sweep(folder / f"{name}.yaml") for name in ("evidence", sweep))
    runs = {run.key: run for row in make_runs(whole).values() for run in row}
    own = [run for row in make_runs(part).values() for run in row]
    assert len(own) == rows
    for run in own:
        assert run.key in runs
        assert run.fingerprint == runs[run.key].fingerprint
    assert set(part.seeds) <= set(whole.seeds)


@pytest.mark.parametrize(("task", "record"), [("mqar", "recall"), ("niah", "niah")])
def test_recorded_results_cover_the_evidence(task, record):
    config = load_sweep(ROOT / "configs" / task / "evidence.yaml")
    first = make_runs(config)
    recorded = read_recorded(RECORDED / f"{record}.jsonl", config, first)
    assert recorded.rows.keys() == first.keys()
    assert len(recorded.notes) == 1, recorded.notes


@pytest.mark.parametrize(
    ("sweep", "record"),
    [
        ("mqar/sweep", "mqar"),
        ("mqar/seeds", "mqar"),
        *((f"mqar/{name}", name) for name in MQAR),
        ("niah/sweep", "niah"),
        ("text/sweep", "text"),
        ("text/controls", "text_controls"),
        ("text/steps", "text_steps"),
        ("mqar/fenwick", "fenwick"),
        ("niah/fenwick", "niah_fenwick"),
        ("niah/delta", "niah_fenwick"),
        ("niah/last_layer", "niah_fenwick"),
        ("mqar/orthogonal", "orthogonal"),
        ("mqar/recall", "recall"),
        ("text/memories", "memories"),
        ("text/gates", "memories"),
        ("text/retention", "retention"),
        ("text/recall", "code"),
        ("text/recall_seeds", "code"),
    ],
)
def test_recorded_results_match_the_shipped_sweeps(sweep, record, monkeypatch):
    """Every run has a recorded result with the current settings."""
    monkeypatch.setattr("train.config.yaml_files.read_yaml", lambda path: READ(path).copy())
    config = load_sweep(ROOT / "configs" / f"{sweep}.yaml")
    found = {key_of(result): result for result in read_file(RECORDED / f"{record}.jsonl")}
    for runs in make_runs(config).values():
        tried = [found[run.key] for run in runs]
        for run in [*runs, *runs_of_row(config, runs, tried)]:
            assert found[run.key]["fingerprint"] == run.fingerprint, run.name
            model = run.config.model
            size = {"state_bytes": state_bytes, "flops_per_token": flops_per_token}
            for name, count in size.items():
                assert found[run.key][name] == count(model, max_example_tokens(run)), run.name
