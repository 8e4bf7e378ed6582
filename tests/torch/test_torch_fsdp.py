"""FSDP models match unsharded models, in two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mc_core

ROOT = Path(mc_core.__file__).parents[1]


@pytest.mark.slow
def test_fsdp_models_match_unsharded_models(tmp_path):
    """Runs all checks of `fsdp_checks` in one test, because imports dominate the run time."""
    command = [sys.executable, ROOT / "tests" / "helpers" / "fsdp_checks.py", tmp_path / "meeting"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all equal"
