"""Small sweeps of a recall task, their results, and a stand-in for their runs."""

from pathlib import Path

import yaml

from helpers.recall_runs import MQAR
from helpers.tiny_run import TINY
from train.sweeps import sweep as sweep_module


def write(folder: Path, **keys: object) -> Path:
    """Write a base of 3 steps and a sweep of it; `keys` go into the sweep."""
    run = TINY["run"] | {"steps": 3, "save_every": 2, "validate_every": 0}
    base = TINY | {"data": MQAR, "run": run, "optimizer": {"warmup_steps": 1}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    sweep = {"base": "base.yaml", "directory": str(folder / "sweep"), "examples": 4}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sweep | keys, sort_keys=False))
    return path


def result(rate: float, seed: int = 0, accuracy: float = 0.5, **keys: object) -> dict:
    cell = {"tokens": 8, "pairs": 2, "right": round(100 * accuracy), "asked": 100}
    return {
        "row": "a", "overrides": {}, "rate": rate, "seed": seed, "accuracy": accuracy, "loss": 1.0,
        "test": [cell], "width": 8, "state_bytes": 100, "state_tokens": 8, "parameters": 7,
        "seconds": 2.0, "wall_seconds": 3.0,
    } | keys  # fmt: skip


class Trained(list):
    """The runs that were trained, in order, from a stand-in for `do`."""

    def __init__(self, monkeypatch, accuracy):
        def do(run):
            self.append((run.row, run.rate, run.seed))
            keys = {"row": run.row, "overrides": run.overrides, "fingerprint": run.fingerprint}
            return result(run.rate, run.seed, accuracy(run), **keys)

        monkeypatch.setattr(sweep_module, "do", do)
