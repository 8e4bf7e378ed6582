"""The training examples learn, resume exactly, and their results convert."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.tiny_run import mc, untrained_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TORCH = str(ROOT / "examples" / "train_torch.py")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")


def run(folder: Path, *words: str) -> list[str]:
    """Return the output lines of a Python command in a folder, on the CPU."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, *words]
    result = subprocess.run(
        command, check=True, cwd=folder, capture_output=True, text=True, env=environment
    )
    return result.stdout.splitlines()


def bits(lines: list[str], prefix: str) -> list[float]:
    return [float(line.split(": ")[1].split()[0]) for line in lines if line.startswith(prefix)]


def test_pytorch_example_resumes_exactly_and_converts(tmp_path, monkeypatch):
    options = ("--batch", "1", "--window", "128", "--save-every", "20", "--bfloat16")
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    lines = run(tmp_path, TORCH, "--steps", "40", "--checkpoint", str(whole), *options)
    losses = bits(lines, "step")
    assert losses[-1] < losses[0] < 8.5
    for steps in ("20", "40"):
        lines = run(tmp_path, TORCH, "--steps", steps, "--checkpoint", str(parts), *options)
    assert lines[0].endswith("from step 20")
    assert bits(lines, "step") == losses[2:]
    one, other = (torch.load(path, weights_only=True) for path in (whole, parts))
    for name, expected in one["state_dict"].items():
        assert torch.equal(other["state_dict"][name], expected), name
    assert mc(monkeypatch, "convert", parts, tmp_path / "model.safetensors") == 0


def test_pytorch_example_in_two_processes_equals_one(tmp_path):
    options = ("--steps", "5", "--batch", "2", "--window", "64")
    alone, together = tmp_path / "alone.pt", tmp_path / "together.pt"
    run(tmp_path, TORCH, *options, "--checkpoint", str(alone))
    run(tmp_path, *TORCHRUN, TORCH, *options, "--checkpoint", str(together))
    one, other = (torch.load(path, weights_only=True) for path in (alone, together))
    for name, expected in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], expected, rtol=1e-3, atol=1e-4)


def test_trainer_example_fine_tunes_an_exported_run(tmp_path, monkeypatch):
    path = ROOT / "examples" / "finetune_hf.py"
    assert len(path.read_text().splitlines()) < 60
    source = untrained_run(tmp_path, "model.mixers=[memory]")
    assert mc(monkeypatch, "export", source, tmp_path / "folder") == 0
    options = ("--steps", "60", "--window", "64")
    lines = run(tmp_path, str(path), "folder", "tuned", *options)
    (before,), (after,) = bits(lines, "before"), bits(lines, "after")
    assert after < before - 0.01
    assert mc(monkeypatch, "convert", tmp_path / "tuned", tmp_path / "tuned.safetensors") == 0
