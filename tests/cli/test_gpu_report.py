"""The GPU report: valid commands, environment, time limits and the outcome of each step."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.documentation import parse_command
from tools.gpu_report import __main__ as report
from tools.gpu_report import environment
from tools.gpu_report.page import read_curve
from tools.gpu_report.steps import Settings, load_steps
from train.config import load_config

ROOT = Path(__file__).parents[2]
STEPS = load_steps()


@pytest.mark.parametrize("tiny", [False, True])
def test_every_step_is_a_valid_command(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for step in STEPS:
        if tiny and not step.tiny:
            continue
        words = Settings(Path("python"), tmp_path, tiny).command(step)[3:]
        parse_command(words)
        if "configs/" in " ".join(words):
            file, *overrides = words[1:] if step.trains else words[2:]
            load_config(Path(file), [word for word in overrides if "=" in word])


def test_steps_cover_kinds_lengths_and_peers():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    layers = {f"layer-{k}-{t}" for k in ("linear", "titans", "delta", "swla", "dla")
              for t in (1024, 8192, 32768)}  # fmt: skip
    peers = {"fla-linear", "flash-attention-4096", "titans-pytorch-16"}
    others = {"model-125m-linear", "model-760m-titans", "decode", "mqar-memory", "mqar-attention"}
    assert layers | peers | others <= set(names)
    together = [step.together for step in STEPS]
    assert together == sorted(together, reverse=True)


def test_only_the_first_combination_is_tiny():
    assert [step.name for step in STEPS if step.tiny and "layer-" in step.name] == [
        "layer-linear-8192"
    ]


@pytest.mark.slow
def test_environment_has_the_packages_of_the_calling_python(tmp_path):
    """What is installed is not installed again; the venv sees it."""
    log = tmp_path / "log"
    python = environment.make_environment(tmp_path / "venv", log, 300, cuda=False)
    probe = "import sys, jax, torch; print(sys.prefix)"
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "venv"
    assert "Requirement already satisfied: torch" in log.read_text()
    assert "Downloading torch" not in log.read_text()


def test_requirements_have_cuda_builds(monkeypatch):
    """In calls of their own for torch and jax, which need other versions of CUDA packages."""
    monkeypatch.setattr(sys, "path", [])
    torch, train = environment.requirements(cuda=True)
    assert "jax[cuda13]" in train
    assert {"numpy", "optax", "flax", "array_record"} <= {name.split(">")[0] for name in train}
    assert [name for name in torch if name.startswith("torch")]
    assert not any(name.startswith("torch") for name in train)
    assert not any("memory-caching" in name or name.startswith("jax") for name in torch)
    assert "jax[cuda13]" not in environment.requirements(cuda=False)[1]


def test_installed_cuda_plugin_is_kept(tmp_path, monkeypatch):
    (tmp_path / "jax_cuda12_plugin-0.10.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "jax[cuda13]" not in environment.requirements(cuda=True)[1]


def test_failed_environment_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "requirements", lambda cuda: [["--wrong-option"]])
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "lib" / "python3" / "site-packages").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    words = ["--tiny", "--out", str(tmp_path), "--environment", str(tmp_path / "venv")]
    assert report.main(words) == 1
    assert "no such option: --wrong-option" in capsys.readouterr().err


STEP = replace(STEPS[0], name="one", title="One", limit=50, together=False)
FAKE = """#!{python}
import pathlib, sys, time
words = sys.argv[1:]
if words[0] == "-c":
    print('{{"device": "Test GPU", "Python": "3"}}')
    sys.exit()
if words[2] == "train":
    folder = pathlib.Path(words[-1].partition("=")[2])
    folder.mkdir()
    rows = ['{{"step": 1, "loss": 3.0, "tokens_per_second": 5.0}}',
            '{{"step": 2, "validation_accuracy": 0.5}}', '{{"st']
    (folder / "metrics.jsonl").write_text("\\n".join(rows))
if words[2] in ("sleep", "train"):
    time.sleep(60)
if words[2] == "fail":
    print("reason of the failure\\n")
    sys.exit(3)
at = words.index("--json")
pathlib.Path(words[at + 1]).write_text('{{"command": "mc ok --json %s --markdown %s"}}'
                                       % (words[at + 1], words[at + 3]))
pathlib.Path(words[at + 3]).write_text("## Table\\n")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs steps with a stand-in for the command."""
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)

    def run(*steps, budget=60.0):
        monkeypatch.setattr(report, "load_steps", lambda: list(steps))
        words = ["--tiny", "--out", str(tmp_path / "out"), "--python", str(python), "--least", "1"]
        code = report.main([*words, "--budget", str(budget)])
        data = json.loads((tmp_path / "out/report.json").read_text())
        page = (tmp_path / "out/report.md").read_text()
        return SimpleNamespace(code=code, data=data, steps=data["steps"], page=page)

    return run


def test_failed_step_does_not_stop_the_report(run, tmp_path):
    made = run(replace(STEP, tiny="fail"), replace(STEP, name="two", title="Two", tiny="ok"))
    assert made.code == 1
    assert [step["status"] for step in made.steps.values()] == ["failed", "done"]
    assert " s: reason of the failure." in made.page
    assert made.steps["two"]["result"]["command"] == "mc ok"
    assert made.page.startswith("# Measured on Test GPU\n")
    assert made.data["machine"]["device"] == "Test GPU"
    assert str(tmp_path) not in made.page


def test_step_stops_at_its_limit_and_the_next_one_runs(run):
    made = run(replace(STEP, limit=1, tiny="sleep"), replace(STEP, name="two", tiny="ok"))
    assert [step["status"] for step in made.steps.values()] == ["stopped", "done"]


@pytest.mark.slow
def test_stopped_training_reports_its_curve(run):
    training = replace(STEP, limit=2, command="train x", tiny="train x")
    made = run(training)
    assert made.steps["one"]["status"] == "stopped"
    assert made.steps["one"]["result"] == [
        {"step": 2, "validation_accuracy": 0.5},
        {"loss": 3.0, "tokens_per_second": 5.0},
    ]
    assert "| 2 | 0.5 |" in made.page


def test_step_needs_the_least_time(run):
    made = run(replace(STEP, tiny="ok"), budget=0.5)
    assert made.steps["one"]["status"] == "skipped"


def test_missing_curve_is_empty(tmp_path):
    assert read_curve(tmp_path) == []


@pytest.mark.slow
def test_tiny_report_succeeds(tmp_path):
    """All tiny steps, through the make target, in an environment of their own."""
    options = f"--tiny --budget 3000 --patience 10 --environment {tmp_path / 'venv'}"
    names = [f"GPU_PYTHON={sys.executable}", f"GPU_REPORT={options} --out {tmp_path / 'out'}"]
    subprocess.run(["make", "gpu-report", *names], cwd=ROOT, check=True)
    data = json.loads((tmp_path / "out/report.json").read_text())
    assert {step["status"] for step in data["steps"].values()} == {"done"}
    assert data["machine"]["device"] == "CPU"
    assert len(data["steps"]) == len([step for step in STEPS if step.tiny])
