"""`mc parity`: both packages agree, and the check detects faults."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tiny_run import mc, write_config
from mc_core.aggregations import AGGREGATIONS
from mc_core.config import GATES, SEGMENTATIONS, START_MODES, VALUE_NORMS
from mc_core.memories import COEFFICIENTS, MEMORIES
from mc_core.optimizer import SCHEDULES, OptimizerConfig
from mc_core.tree_utils import flatten
from parity import run_jax, run_torch
from parity import train as training
from parity.cases import DTYPES, LEVELS, MASKS, METHODS, draw
from parity.check import check, check_case
from parity.compare import Outcome, Tolerance, compare, compare_rounded, difference, tolerance
from parity.environment import quick_compile
from parity.faults import FAULTS, TIES, injected, selftest
from parity.files import write_safetensors
from parity.grids import QUICK, full
from parity.leaves import Leaf, cotangent
from parity.report import as_json, as_markdown, failures, summary
from train.optimizer import make_optimizer, make_schedule

EXACT = Tolerance(1e-10, 1e-9)


def leaf(*values, dtype="float64"):
    return Leaf(np.asarray(values, np.float64), dtype)


def run(code: str, *words: object) -> subprocess.CompletedProcess:
    """Run the command in a subprocess, after some code."""
    argv = f"import sys; sys.argv = ['mc', 'parity', *{list(map(str, words))!r}]; "
    main = "from train.cli import main; main()"
    command = [sys.executable, "-c", argv + (code or "{}").format(main)]
    if not code:
        command = [sys.executable, "-m", "parity", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SLOW = (
    "linear+grm chunked 2+1+10", "linear+grm chunked restart mask", "linear+grm layer",
    "linear+mean layer learn", "linear+none model restart",
    "linear+none model mask=some conv_width", "linear+none model output_norm", "linear+residual",
    "linear+soup", "swla+grm", "swla+mean", "swla+residual", "swla+ssc chunked", "dla+grm",
    "dla+residual chunked restart", "dla+soup", "titans+grm", "titans+mean", "titans+none",
    "titans+residual model", "titans+soup", "titans+ssc", "delta+grm", "delta+mean", "delta+none",
    "delta+soup", "delta+ssc", "dla+ssc", "dla+residual layer", "linear+grm chunked mask",
    "linear+none model 6+7",
)  # fmt: skip


def quick_params() -> list[Any]:
    """One parameter per case; those in `SLOW`, which others nearly repeat, are slow tests."""
    return [
        pytest.param(
            case,
            id=f"{case.name} {case.dtype}",
            marks=pytest.mark.slow if case.name.startswith(SLOW) else (),
        )
        for case in QUICK
    ]


@pytest.mark.parametrize("case", quick_params())
def test_quick_grid_passes(case):
    failed = failures([check_case(case)])
    assert not failed, failed


def test_outcomes_follow_case_order(monkeypatch):
    """Cases run in several threads."""
    turns = []

    def slow_first(case, *_):
        turns.append(case)
        time.sleep(0.2 if case is QUICK[0] else 0)
        return Outcome(case, ())

    monkeypatch.setattr("parity.check.check_case", slow_first)
    assert [outcome.case for outcome in check(QUICK[:5])] == list(QUICK[:5])
    assert sorted(case.name for case in turns) == sorted(case.name for case in QUICK[:5])


@pytest.mark.slow
def test_full_grid_passes():
    failed = failures(list(check(full())))
    assert not failed, "\n".join(failed)


@pytest.mark.slow
def test_quick_grid_passes_in_float32():
    failed = failures(list(check(case.where(dtype="float32") for case in QUICK)))
    assert not failed, "\n".join(failed)


def test_quick_grid_covers_every_choice():
    layers = [case.layer for case in QUICK]
    pairs = {(layer.memory.kind, layer.aggregation) for layer in layers}
    assert pairs == {(kind, aggregation) for kind in MEMORIES for aggregation in AGGREGATIONS}
    for kind in MEMORIES:
        own = [layer for layer in layers if layer.memory.kind == kind]
        assert {layer.state_init_mode for layer in own} == {"checkpoint", "restart"}
    assert {layer.segmentation for layer in layers} == set(SEGMENTATIONS)
    assert {layer.memory.coefficients for layer in layers} == set(COEFFICIENTS)
    assert {layer.pooling for layer in layers} == {"mean", "sum"}
    assert {layer.gate for layer in layers if layer.gated} == set(GATES)
    assert {layer.has_gate_bias for layer in layers} == {True, False}
    assert {layer.learns_temperature for layer in layers} == {True, False}
    scored = [layer for layer in layers if layer.gated and layer.gate == "context"]
    assert {layer.pool_norm for layer in scored} == {"none", "l2"}
    assert {getattr(layer.memory, "norm", "none") for layer in layers} == {"none", "layer"}
    assert {layer.output_norm for layer in layers} == {"rms", "none"}
    assert {layer.normalizes_qk for layer in layers} == {True, False}
    assert {layer.value_norm for layer in layers} == set(VALUE_NORMS)
    assert {layer.memory.decays_to_initial for layer in layers} == {True, False}
    assert {bool(layer.memory.fixed_layers) for layer in layers} == {True, False}
    assert any(getattr(layer.memory, "normalize", False) for layer in layers)
    assert any(layer.conv_width for layer in layers)
    assert any(layer.detach_cached_states for layer in layers)
    assert any(layer.detach_cached_context for layer in layers)
    assert {case.level for case in QUICK} == set(LEVELS)
    assert {case.method for case in QUICK} == set(METHODS)
    assert {case.mask for case in QUICK} == set(MASKS)
    assert {case.dtype for case in QUICK} == set(DTYPES)
    assert any(case.lengths for case in QUICK)
    assert {case.level for case in QUICK if case.splits} == set(LEVELS)
    assert {case.layer.memory.kind for case in QUICK if case.splits} == set(MEMORIES)
    assert {case.layer.state_init_mode for case in QUICK if case.splits} == set(START_MODES)
    assert any(case.padding for case in QUICK)
    assert all(sum(case.splits) == case.tokens for case in full() if case.splits)
    assert sum(bool(case.splits) for case in full()) > 30
    assert len({(case.name, case.dtype) for case in QUICK}) == len(QUICK)


def test_ties_select_the_same_memories():
    inputs = draw(TIES)
    gates = [side.run(TIES, inputs, {})["gates"].value for side in (run_jax, run_torch)]
    np.testing.assert_array_equal(gates[0] > 0, gates[1] > 0)
    read = gates[0][:, 2 * TIES.layer.segment_size :, :, :-1] > 0
    assert (read.sum(-1) == TIES.layer.ssc_top_k).all()
    assert read[..., 0].all(), "the earliest of equal memories"


@pytest.mark.slow
def test_training_steps_agree():
    both = training.train(make_optimizer, steps=20)
    assert both.ok, training.summary(both)
    assert len(both.steps) == 20
    assert both.steps[-1].loss[0] < both.steps[0].loss[0]
    assert max(step.norm[0] for step in both.steps) > training.OPTIMIZER.clip_norm, "clips"
    assert training.draw(both, Path("x.png")).startswith(b"\x89PNG")


def test_first_steps_of_a_run_agree(monkeypatch, capsys, tmp_path):
    """Also if the warm-up is longer than the comparison."""
    config = write_config(tmp_path, optimizer={"learning_rate": 0.01, "warmup_steps": 10})
    words = ("parity", "train", "--config", config, "--steps", 2, "--tokens", 9)
    assert mc(monkeypatch, *words) == 0
    assert "over 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("schedule_name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3, 10])
def test_learning_rates_agree(warmup, schedule_name):
    config = OptimizerConfig(warmup_steps=warmup, schedule=schedule_name, decay_fraction=0.4)
    ours = [training.learning_rate(config, step, 11) for step in range(11)]
    np.testing.assert_allclose(ours, [*map(make_schedule(config, 11), range(11))], rtol=1e-6)


def test_optimizers_without_a_twin_are_refused(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, optimizer={"name": "muon", "warmup_steps": 1})
    assert mc(monkeypatch, "parity", "train", "--config", config) == 2
    assert "optimizer.name = 'muon'" in capsys.readouterr().err


# Detection of faults


@pytest.mark.slow
def test_injected_faults_are_detected_in_expected_leaf():
    findings = list(selftest())
    missed = [
        f"{finding.fault.name if finding.fault else 'nothing'}: "
        f"{finding.first.describe() if finding.first else 'no leaf'}"
        for finding in findings
        if not finding.ok
    ]
    assert not missed, "\n".join(missed)
    caught = {finding.fault.name for finding in findings if finding.fault}
    assert caught == {fault.name for fault in FAULTS}
    assert len(caught) >= 12
    assert sum(finding.fault is None for finding in findings) == len({f.case for f in FAULTS})


def test_error_metrics():
    same = difference("x", leaf(3.0, 4.0), leaf(3.0, 4.0), 1e-10)
    assert (same.ok, same.error, same.maximum) == (True, 0, 0)
    assert same.cosine == pytest.approx(1)
    far = difference("x", leaf(3.0, 4.5), leaf(3.0, 4.0), 0.1)
    assert far.error == pytest.approx(0.5 / 5)
    assert far.maximum == pytest.approx(0.5 / 4)
    assert far.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert not difference("x", leaf(3.0, 4.5), leaf(3.0, 4.0), 0.09).ok
    nearly_zero = difference("x", leaf(1e-14), leaf(0.0), 1e-10)
    assert (nearly_zero.ok, nearly_zero.cosine) == (True, 0)
    assert difference("x", leaf(0.0), leaf(0.0), 0).cosine == 1
    assert difference("x", leaf(), leaf(), 0).ok


@pytest.mark.parametrize(
    ("actual", "expected", "problem"),
    [
        (leaf(1.0, np.nan), leaf(1.0, 2.0), "1 NaN or infinite values in torch, 0 in jax"),
        (leaf(np.nan, 1.0), leaf(1.0, np.nan), "1 NaN or infinite values in torch, 1 in jax"),
        (leaf(np.nan), leaf(np.nan), "no finite value in either framework"),
        (leaf(1.0), leaf(1.0, 1.0), "shape (1,) in torch, (2,) in jax"),
        (leaf(1.0, dtype="float32"), leaf(1.0), "dtype float32 in torch, float64 in jax"),
        (None, leaf(1.0), "missing in torch"),
        (leaf(1.0), None, "missing in jax"),
    ],
)
def test_shape_dtype_and_nan_mismatches_fail(actual, expected, problem):
    found = difference("x", actual, expected, 1.0)
    assert not found.ok
    assert found.problem == problem
    assert found.describe() == f"x: {problem}"


def test_matching_nan_positions_are_ignored():
    assert difference("x", leaf(np.nan, 1.0), leaf(np.nan, 1.0), 0).ok
    assert not difference("x", leaf(np.nan, 1.1), leaf(np.nan, 1.0), 1e-3).ok


def test_leaves_have_own_limit_in_forward_order():
    expected = {"output": leaf(1.0), "gradient.q": leaf(1.0), "gradient.k": leaf(1.0)}
    actual = {"gradient.k": leaf(1.5), "gradient.q": leaf(1 + 5e-10), "output": leaf(1 + 5e-10)}
    found = compare(actual, expected, EXACT)
    assert [(x.name, x.ok) for x in found] == [
        ("output", False),
        ("gradient.q", True),
        ("gradient.k", False),
    ]
    outcome = Outcome(QUICK[0], found)
    assert outcome.first_failure is found[0]
    assert outcome.worst is found[2]
    missing = compare(actual | {"more": leaf(1.0)}, expected, EXACT)
    assert missing[-1].problem == "missing in jax"


def test_bfloat16_is_compared_with_float64():
    exact = {"x": leaf(*np.ones(16))}
    near, far = {"x": leaf(*np.full(16, 1.001))}, {"x": leaf(*np.full(16, 1.01))}
    assert all(x.ok for x in compare_rounded(near, near, exact, exact, EXACT))
    # Five times farther from float64 than the other side: a lower precision.
    assert not any(x.ok for x in compare_rounded(far, near, exact, exact, EXACT))
    # The same wrong result in both dtypes.
    assert not any(x.ok for x in compare_rounded(far, near, far, exact, EXACT))


def test_float32_tolerance_grows_with_length():
    assert tolerance("float32", "cpu", 128) == Tolerance(2e-6, 1e-5)
    assert tolerance("float32", "cpu", 512) == Tolerance(8e-6, 4e-5)
    assert tolerance("float64", "cpu", 512) == EXACT


def test_cotangents_depend_only_on_name():
    np.testing.assert_array_equal(cotangent("a", (3,), 0), cotangent("a", (3,), 0))
    assert not np.array_equal(cotangent("a", (3,), 0), cotangent("b", (3,), 0))


def test_leaves_are_named_by_their_path():
    tree = {"a": (1, [2, None]), "b": leaf(3.0)}
    assert [name for name, _ in flatten(tree)] == ["a.0", "a.1.0", "b.value", "b.dtype"]


def test_parity_lists_mismatched_parameters():
    case = next(case for case in QUICK if case.level == "layer")
    weights = run_jax.parameters(case)
    weights["extra"] = weights.pop("q_proj.kernel")
    with pytest.raises(ValueError, match=r"missing q_proj.kernel(.|\n)*unexpected extra"):
        run_jax.run(case, draw(case), weights)


# The command


ONE_CASE = ("check", "--kind", "swla", "--aggregation", "residual")


def test_parity_command_writes_report(monkeypatch, capsys, tmp_path):
    files = {"--json": tmp_path / "report.json", "--markdown": tmp_path / "report.md"}
    words = [word for item in files.items() for word in item]
    assert mc(monkeypatch, "parity", *ONE_CASE, *words) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "swla+residual recurrent" in out
    assert "all equal: 1 case, 22 leaves, cpu" in out
    report = json.loads(files["--json"].read_text())
    assert report["ok"]
    (case,) = report["cases"]
    assert case["config"]["memory"]["kind"] == "swla"
    assert case["leaves"][0]["name"] == "cache.stored.weights.0"
    assert "| swla+residual recurrent" in files["--markdown"].read_text()


def test_parity_command_fails_on_difference(monkeypatch, capsys):
    with injected(next(fault for fault in FAULTS if fault.name == "mask ignored")):
        assert mc(monkeypatch, "parity", *ONE_CASE) == 1
    out, err = capsys.readouterr()
    assert not err
    line = out.splitlines()[-2]
    assert "first to diverge, in forward order: cache.stored.weights.0: relative RMS" in line
    assert "1 of 1 cases differ" in out


@pytest.mark.slow
def test_parity_command_as_subprocess():
    """The command sets XLA flags before jax is imported."""
    done = run("", *ONE_CASE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all equal: 1 case, 22 leaves, cpu" in done.stdout


@pytest.mark.parametrize(("release", "known"), [("0.10.2", True), ("0.12.0.1", False)])
def test_unknown_xla_flags_are_not_set(monkeypatch, release, known):
    """Unknown flags would abort the process."""
    monkeypatch.setattr("parity.environment.version", lambda _: release)
    assert ("xla_cpu_use_fusion_emitters" in quick_compile()) == known


@pytest.mark.parametrize("package", ["torch", "jax"])
def test_missing_framework_is_a_one_line_error(package):
    done = run(f"sys.modules['{package}'] = None; {{}}", "check")
    assert done.returncode == 2
    assert done.stderr == (
        f"mc: {package} is not installed: pip install 'memory-caching-jax[{package}]'\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "--kind", "attention"), "'attention' is not one of 'linear', 'swla'"),
        (("check", "--dtype", "float16"), "'float16' is not one of"),
        (("check", "--device", "cuda"), "finds no CUDA device"),
        (("check", "--tokens", "7"), "--tokens: requires --config or --checkpoint"),
        (("check", "--config", "none.yaml"), "none.yaml: No such file"),
        (("check", "--checkpoint", "none.zip"), "must be a run directory, or a file that ends"),
        (("train", "--config", "none.yaml"), "none.yaml: No such file"),
    ],
)
def test_invalid_options_are_one_line_errors(monkeypatch, capsys, words, message):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mc(monkeypatch, "parity", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_parity_of_user_model_and_weights(monkeypatch, capsys, tmp_path):
    config = write_config(tmp_path)
    words = ("parity", "check", "--config", config, "--tokens", 11)
    assert mc(monkeypatch, *words, "--dtype", "float32") == 0
    assert "linear+grm model" in capsys.readouterr().out

    layer = next(case for case in QUICK if case.level == "layer").where(dtype="float32")
    weights = {name: x.astype(np.float32) for name, x in run_jax.parameters(layer).items()}
    file = tmp_path / "weights.safetensors"
    write_safetensors(file, layer.config, run_torch.to_torch(weights))
    assert mc(monkeypatch, *words, "--checkpoint", file) == 2
    assert "has another model than" in capsys.readouterr().err
    assert mc(monkeypatch, "parity", "check", "--checkpoint", file) == 0
    assert "linear+residual layer" in capsys.readouterr().out


def test_report_names_first_diverging_leaf():
    found = compare({"a": leaf(2.0), "b": leaf(9.0)}, {"a": leaf(1.0), "b": leaf(1.0)}, EXACT)
    outcome = Outcome(QUICK[0], found)
    (line,) = failures([outcome])
    assert line.endswith("in forward order: a: relative RMS error 1.0e+00 > 1.0e-10")
    data = json.loads(as_json([outcome], "cpu", 1.0))
    assert not data["ok"]
    assert data["cases"][0]["first_to_diverge"] == "a"
    assert data["cases"][0]["worst"] == "b"
    assert line in as_markdown([outcome], "cpu", 1.0)
    assert summary([outcome], "cpu", 1.0).startswith("1 of 1 cases differ: 1 case, 2 leaves, cpu")
