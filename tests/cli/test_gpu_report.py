"""The GPU report: valid commands, time limits and the outcome of each step."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.documentation import parse_command
from tools.gpu_report import __main__ as report

STEPS = report.load_steps()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("which", ["command", "tiny"])
def test_every_step_is_a_valid_command(step, which):
    words = getattr(step, which).split()
    parse_command([*words, "--json", "x.json", "--markdown", "x.md"])


def test_names_are_unique_and_untimed_steps_come_first():
    assert len({step.name for step in STEPS}) == len(STEPS)
    together = [step.together for step in STEPS]
    assert together == sorted(together, reverse=True)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*steps, budget=60.0):
        monkeypatch.setattr(report, "load_steps", lambda: list(steps))
        code = report.main(
            ["--tiny", "--out", str(tmp_path), "--budget", str(budget), "--least", "1"]
        )
        data = json.loads((tmp_path / "report.json").read_text())
        return SimpleNamespace(code=code, data=data, page=(tmp_path / "report.md").read_text())

    return run


STEP = replace(STEPS[0], name="one", title="One", limit=50, together=False)


SMALL = "bench layer --tokens 32 --width 16 --heads 2 --chunk 16 --segment 16 --runs 0"


@pytest.mark.slow
def test_failed_step_does_not_stop_the_report(run, tmp_path):
    wrong = replace(STEP, tiny="bench layer --heads 3")
    made = run(wrong, replace(STEP, name="two", title="Two", tiny=SMALL))
    assert made.code == 1
    assert [step["status"] for step in made.data.values()] == ["failed", "done"]
    assert "failed after" in made.page
    assert made.data["two"]["result"]["command"] == f"mc {SMALL}"
    assert f"`mc {SMALL}`" in made.page
    assert str(tmp_path) not in made.page


@pytest.mark.slow
def test_step_stops_at_its_limit(run):
    made = run(replace(STEP, limit=2, tiny="bench peers --only linear-4096"))
    assert made.code == 1
    assert made.data["one"]["status"] == "stopped"


def test_step_needs_the_least_time(run):
    made = run(replace(STEP, tiny=SMALL), budget=0.5)
    assert made.data["one"]["status"] == "skipped"
