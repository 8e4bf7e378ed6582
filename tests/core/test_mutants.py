"""The mutation check: all mutants apply, and pytest's results are parsed correctly."""

import subprocess

import pytest

from tools.mutants.__main__ import make_table
from tools.mutants.runner import OWN_TEST, MutantOutcome, run_tests
from tools.mutants.table import ROOT, Mutant, choose, find_test_file, join, load_mutants

MUTANTS = load_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_mutant_applies_and_its_test_files_exist(mutant):
    mutated = mutant.apply(ROOT)
    compile(mutated, mutant.file, "exec")
    for name in mutant.tests:
        find_test_file(ROOT, name)


@pytest.mark.parametrize("source", ["x = 2\n", "x = 1\nx = 1\n"])
def test_patch_text_must_occur_exactly_once(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    mutant = Mutant("one", "x is 3", "a.py", "x = 1", "x = 3", {})
    with pytest.raises(ValueError, match=r"a\.py: must have exactly one 'x = 1'"):
        mutant.apply(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {fault: f}", r"a\.yaml: a: must have the keys"),
        ("a: {fault: f, file: f, old: 1, new: x, tests: {t: x}}", "old = 1: must be text"),
        ("a: {fault: f, file: f, old: x, new: y, tests: {}}", "must map test files"),
    ],
)
def test_mutant_table_is_strict(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_mutants(tmp_path)


def test_names_select_mutants():
    assert choose(MUTANTS, []) == MUTANTS
    chosen = choose(MUTANTS, ["core-*", "jax-rope-base"])
    assert {mutant.name.partition("-")[0] for mutant in chosen} == {"core", "jax"}
    with pytest.raises(ValueError, match="no-such: no mutant"):
        choose(MUTANTS, ["no-such"])


def test_baseline_runs_all_selected_tests():
    one, two, all_ = (
        Mutant(name, "", "", "", "", tests)
        for name, tests in (("a", {"t": "x or y"}), ("b", {"t": "z", "s": "w"}), ("c", {"s": None}))
    )
    assert join([one, two]) == {"t": "(x or y) or (z)", "s": "(w)"}
    assert join([two, all_]) == {"t": "(z)", "s": None}


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, "survived"), (1, "caught"), (2, "does not import"), (4, "pytest exits with 4"),
     (5, "selects no test")],
)  # fmt: skip
def test_only_failing_tests_catch_a_mutant(monkeypatch, code, status):
    done = subprocess.CompletedProcess([], code, "FAILED tests/a/test_b.py::test_c[1 - 2] - x\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    outcome = run_tests(ROOT, OWN_TEST, None, limit=60.0)
    assert outcome[:2] == (status, "test_b.py::test_c[1 - 2]")


def test_failing_test_is_reported(tmp_path):
    (tmp_path / "tests" / "sub").mkdir(parents=True)
    (tmp_path / "tests" / "sub" / "test_it.py").write_text(
        "def test_good(): assert True\ndef test_bad(): assert False\n"
    )
    outcome = run_tests(tmp_path, "test_it", "good or bad", limit=300.0)
    assert outcome[:2] == ("caught", "test_it.py::test_bad")


def test_missing_test_file_is_not_a_failure(tmp_path):
    outcome = run_tests(tmp_path, "test_missing", None, limit=60.0)
    assert outcome.status == "has no tests"
    assert "test_missing.py: must be one file under tests/" in outcome.test


def test_table_counts_caught_mutants():
    mutants = [Mutant(name, "f", "a.py", "x", "y", {}) for name in ("one", "two")]
    outcomes = {
        "one": MutantOutcome("caught", "t.py::test[a|b]", 1.0),
        "two": MutantOutcome("survived", "", 2),
    }
    lines = make_table(mutants, outcomes, 3.0).splitlines()
    assert lines[2] == "| one | a.py | f | caught | t.py::test[a b] | 1 |"
    assert lines[-1] == "1 of 2 mutants caught, 3 s."
