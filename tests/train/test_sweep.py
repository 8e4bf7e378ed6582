"""`mc sweep`: rows, choice of rates, and resumption."""

import functools
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.sweeps import Trained, result, write
from helpers.tiny_run import mc
from mc_core.errors import UserError
from mc_core.footprint import cache_footprint
from mc_core.installation import source_commit
from parity.environment import cores
from train.config import load_config
from train.config.yaml_files import read_yaml
from train.sweeps import sweep as subject
from train.sweeps.results import Results, best, read_results
from train.sweeps.sweep_config import SweepConfig, load_sweep, make_runs, row_name
from train.sweeps.table import make_table, score

ROOT = Path(__file__).parents[2]


def test_rows_are_all_combinations_and_explicit_rows(tmp_path):
    kind, width = "model.layer.memory.kind", "model.layer.d_model"
    path = write(
        tmp_path,
        vary=[{kind: ["linear", "titans"], width: [8, 16]}, {width: [32]}],
        rows=[{"data.lengths": [[8, 2]]}, {"model.layer.memory": {"kind": "dla", "step": 0.1}}],
        rates=[0.01, 0.001],
        seeds=[3, 4],
    )
    runs = make_runs(load_sweep(path))
    assert list(runs) == [
        "lengths=8-2",
        "memory=kind-dla-step-0.1",
        "kind=linear,d_model=8",
        "kind=linear,d_model=16",
        "kind=titans,d_model=8",
        "kind=titans,d_model=16",
        "d_model=32",
    ]
    assert [(run.seed, run.rate) for run in runs["d_model=32"]] == [(3, 0.01), (3, 0.001)]
    one, _ = runs["kind=titans,d_model=16"]
    assert one.config.model.layer.memory.kind == "titans"
    assert one.config.model.layer.d_model == 16
    assert one.config.optimizer.learning_rate == 0.01
    assert one.config.run.seed == 3
    assert one.config.run.directory.endswith("sweep/kind=titans,d_model=16/rate=0.01,seed=3")
    assert runs["lengths=8-2"][0].config.data.lengths == ((8, 2),)
    assert runs["memory=kind-dla-step-0.1"][0].config.model.layer.memory.step == 0.1
    every = [run for row in runs.values() for run in row]
    assert len({run.fingerprint for run in every}) == len(every) == 14
    assert len({run.config.run.directory for run in every}) == 14


def test_row_names_are_valid_and_distinct():
    assert row_name({}) == "base"
    assert row_name({"a.x": 1, "b.x": "p/q"}, {"x"}) == "a.x=1,b.x=p-q"
    long = [row_name({f"key{i}": i for i in range(n)}) for n in (30, 31)]
    assert len(set(long)) == 2
    assert max(map(len, long)) <= 120


def test_best_rate_has_best_validation_accuracy():
    rows = [result(0.1, accuracy=0.6), result(0.01, accuracy=0.7), result(0.02, accuracy=0.7)]
    assert best(rows)["rate"] == 0.01
    rows[2]["loss"] = 0.9
    assert best(rows)["rate"] == 0.02
    assert best([result(0.1, error="step 3: ..."), result(1.0, accuracy=0.0)])["rate"] == 1.0
    assert best([result(0.1, loss=math.nan), result(1.0, accuracy=0.0)])["rate"] == 1.0


def test_table_pools_seeds_and_shows_their_range():
    config = SweepConfig(Path("x"), "y", seeds=(0, 1), rates=(0.1, 0.2))
    rows = [result(0.1, seed=s, accuracy=a) for s, a in ((0, 0.5), (1, 0.7))]
    failed = result(0.2, row="b", error="step 2: the loss is not finite")
    table = make_table("t", [*rows, failed], config)
    line, other = table.rows
    assert line["accuracy %"] == pytest.approx(60.0)
    assert (line["lowest %"], line["highest %"]) == (50.0, 70.0)
    assert line["8:2"] == pytest.approx(60.0)
    assert (line["from %"], line["to %"]) == pytest.approx((53.1, 66.5), abs=0.1)
    assert score(rows)["low"] == line["from %"] / 100
    assert other["failed"] == 1
    assert other["accuracy %"] is None
    assert "8:2" not in make_table("t", rows, config, cells=False).columns
    assert "best validation accuracy" in table.as_markdown()


def test_other_seeds_run_only_at_the_chosen_rate(tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path, vary={"model.layer.aggregation": ["none", "grm"]}, rates=[0.1, 0.2], seeds=[5, 6]
    )
    better = {"aggregation=none": 0.1, "aggregation=grm": 0.2}
    trained = Trained(monkeypatch, lambda run: 0.9 if run.rate == better[run.row] else 0.4)
    assert mc(monkeypatch, "sweep", path) == 0
    assert trained == [
        ("aggregation=none", 0.1, 5),
        ("aggregation=none", 0.2, 5),
        ("aggregation=none", 0.1, 6),
        ("aggregation=grm", 0.1, 5),
        ("aggregation=grm", 0.2, 5),
        ("aggregation=grm", 0.2, 6),
    ]
    out = capsys.readouterr().out
    assert re.findall(r"(?m)^\d+/\d+", out) == [f"{number}/6" for number in range(1, 7)]
    lines = (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    """Also after an incomplete line; a finished sweep only prints its table."""
    keys = {"vary": {"model.layer.d_model": [8, 16, 32]}, "seeds": [0, 1]}
    path = write(tmp_path, **keys)
    whole = Trained(monkeypatch, lambda run: 0.5)
    assert mc(monkeypatch, "sweep", path) == 0
    assert len(whole) == 6
    file = tmp_path / "sweep" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *lines[2:4], lines[4][:25]]))
    again = Trained(monkeypatch, lambda run: 0.5)
    assert mc(monkeypatch, "sweep", path) == 0
    assert again == [whole[1], whole[4], whole[5]]
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    none = Trained(monkeypatch, lambda run: 0.5)
    assert mc(monkeypatch, "sweep", path) == 0
    assert none == []


def test_sweep_trains_tests_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NPROC", raising=False)
    path = write(tmp_path, vary={"model.layer.aggregation": ["none"]})
    markdown, plot = tmp_path / "table.md", tmp_path / "x.png"
    assert mc(monkeypatch, "sweep", path, "--markdown", markdown, "--plot", plot) == 0
    out = capsys.readouterr().out
    (row,) = read_results(tmp_path / "sweep")
    config = load_config(tmp_path / "base.yaml", ["model.layer.aggregation=none"])
    assert row["overrides"] == {"model.layer.aggregation": "none"}
    assert row["state_tokens"] == 24  # of the longest test examples
    assert row["state_bytes"] == cache_footprint(config.model.layer, 24).total
    assert (row["width"], row["steps"], row["seed"]) == (8, 3, 0)
    assert row["rate"] == config.optimizer.learning_rate
    assert [(c["tokens"], c["pairs"]) for c in row["test"]] == [
        (8, 2), (12, 2), (12, 3), (24, 2), (24, 3), (24, 6),
    ]  # fmt: skip
    assert math.isfinite(row["loss"])
    assert row["seconds"] <= row["wall_seconds"]
    assert {"jax", "flax"} <= row["versions"].keys()
    assert row["commit"] == source_commit()
    assert row["machine"].keys() == {"device", "processor", "cores", "Python", "NPROC"}
    assert (row["machine"]["cores"], row["machine"]["NPROC"]) == (len(cores()), "1")
    assert f"| aggregation=none | {row['rate']:g} | 1 | {row['parameters']:,} |" in (
        markdown.read_text()
    )
    assert "validation accuracy" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (
        json.loads(
            (
                tmp_path / "sweep/aggregation=none" / f"rate={row['rate']:g},seed=0/report.json"
            ).read_text()
        )["score"]["accuracy"]
        == row["accuracy"]
    )

    # Results of another configuration in the same folder are refused.
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("steps: 3", "steps: 4"))
    assert mc(monkeypatch, "sweep", path) == 2
    err = capsys.readouterr().err
    assert "has aggregation=none of another config" in err
    assert err.count("\n") == 1


def test_damaged_results_line_is_named(tmp_path, monkeypatch, capsys):
    """For example, a line without a fingerprint cannot be matched to a run."""
    path, file = write(tmp_path), tmp_path / "sweep" / "results.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps(result(0.01, row="base")) + "\n")
    assert mc(monkeypatch, "sweep", path) == 2
    message = f"{file}: line 1 is not a result of a run: 'fingerprint': correct or delete it"
    assert capsys.readouterr().err == f"mc: {message}\n"


def test_interrupted_run_is_resumed(tmp_path, monkeypatch):
    """The sweep passes an interrupted run to the loop, which resumes from its checkpoint."""
    path = write(tmp_path)
    (run,) = make_runs(load_sweep(path))["base"]
    asked = []

    def train(config, console, *, claimed):
        assert claimed
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "train", train)
    assert mc(monkeypatch, "sweep", path) == 130
    assert asked == [run.config]
    assert read_results(tmp_path / "sweep") == []


def test_nan_run_is_a_failed_result(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, rates=[1e38], rows=[{"optimizer.weight_decay": 0.0}])
    assert mc(monkeypatch, "sweep", path) == 0
    (row,) = read_results(tmp_path / "sweep")
    assert "is not finite" in row["error"]
    assert "is not finite" in capsys.readouterr().out
    assert mc(monkeypatch, "sweep", path) == 0


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_nonfinite_validation_loss_fails_the_run(tmp_path, monkeypatch, figure):
    """The training loss may be finite although the validation loss is not."""
    report = SimpleNamespace(score={"accuracy": 1.0, "loss": figure})
    monkeypatch.setattr(subject, "train", lambda config, console, claimed: report)
    assert mc(monkeypatch, "sweep", write(tmp_path)) == 0
    (row,) = read_results(tmp_path / "sweep")
    assert row["error"] == "the validation loss is not finite"


def test_nonfinite_test_loss_is_null_in_json(tmp_path):
    cell = {"right": 1, "asked": 2, "loss": math.nan}
    Results(tmp_path).add(result(0.1, test=[cell], fingerprint="x"))
    line = (tmp_path / "results.jsonl").read_text()
    (found,) = json.loads(line, parse_constant=pytest.fail)["test"]
    assert found == cell | {"loss": None}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": 3}, "base = 3: must be the path of a file"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: No such file"),
        ({"vari": {}}, "unknown key 'vari'; allowed are base, "),
        ({"vary": {"run.steps": 3}}, "vary.run.steps = 3: must be a list of values"),
        ({"vary": 3}, "vary = 3: must be a list"),
        ({"vary": {"run.stesp": [3]}}, "run: unknown key 'stesp'"),
        ({"vary": {"run.steps": [0]}}, "run.steps = 0: must be >= 1"),
        ({"vary": {"run.seed": [1]}}, "'run.seed': must be no key set by seeds, rates"),
        ({"rows": [{"a": 1}, {"a": 1}]}, "'a=1': must be different rows"),
        ({"rows": [3]}, "rows[0] = 3: must be a mapping"),
        ({"seeds": []}, "seeds = []: must be a list of different values"),
        ({"seeds": [-1]}, "run.seed = -1: must be in"),
        ({"seeds": ["x"]}, "seeds[0] = 'x': must be of type int"),
        ({"rates": [0.1, 0.1]}, "rates = [0.1, 0.1]: must be a list of different values"),
        ({"rates": [0.001, 0.0010000001]}, "0.0010000001]: must be different in six digits"),
        ({"vary": None}, "vary = None: must be a list"),
        ({"rows": None}, "rows = None: must be a list"),
        ({"seeds": None}, "seeds = None: must be a list"),
        ({"vary": {1: [2]}}, "vary[0] = {1: [2]}: must be a mapping with text keys"),
        ({"rows": [{1: 2}]}, "rows[0] = {1: 2}: must be a mapping with text keys"),
        ({"rates": [-1.0]}, "optimizer.learning_rate = -1.0"),
        ({"examples": 0}, "examples = 0: must be >= 1"),
        ({"directory": 3}, "directory = 3: must be of type str"),
        (
            {"rows": [{"data.task": "text", "data.corpus": "x"}]},
            "examples = 4: not supported for text",
        ),
        ({"vary": {"data.task": ["mqar", "niah"]}}, "data.task = mqar, niah: must be the same"),
    ],
)
def test_invalid_sweeps_are_refused(tmp_path, monkeypatch, capsys, keys, message):
    path = write(tmp_path, **keys)
    assert mc(monkeypatch, "sweep", path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_shipped_configs_load_and_shared_directories_agree(monkeypatch):
    """Sweeps that share a directory must give the same names to the same runs."""
    read = functools.cache(read_yaml)  # every run reads its base, and that one's
    monkeypatch.setattr("train.config.yaml_files.read_yaml", lambda path: read(path).copy())
    found: dict[tuple, str] = {}
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    sweeps = {path: load_sweep(path) for path in paths if {"vary", "rows"} & set(read(path))}
    rows = {path: make_runs(sweep) for path, sweep in sweeps.items()}
    for path, sweep in sweeps.items():
        for run in itertools.chain(*rows[path].values()):
            key = sweep.directory, *run.key
            assert found.setdefault(key, run.fingerprint) == run.fingerprint, path
    assert len(sweeps) >= 10
    for path in set(paths) - set(sweeps):
        assert load_config(path, []).run.steps > 0, path
    shipped = ROOT / "configs" / "mqar" / "sweep.yaml"
    assert (sweeps[shipped].directory, len(rows[shipped])) == ("runs/sweep", 45)
    assert {row[0].config.data.task for row in rows[shipped].values()} == {"mqar"}


def test_unreadable_sweep_files_are_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_sweep(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="must be a mapping"):
        load_sweep(tmp_path / "x.yaml")
