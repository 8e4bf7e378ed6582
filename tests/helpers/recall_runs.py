"""Runs on recall tasks, and a model that knows the answers that a test chooses."""

from pathlib import Path

import numpy as np
import yaml

from helpers.tiny_run import TINY
from train.evaluation import evaluate

MQAR = {"task": "mqar", "vocab_size": 24, "lengths": [[8, 2], [12, 3]], "validation_examples": 7}
NIAH = {"task": "niah", "lengths": [240], "validation_examples": 3}


def write(folder: Path, data: dict = MQAR, **run: object) -> Path:
    path = folder / "recall.yaml"
    where = {"directory": str(folder / "runs" / "recall")}
    path.write_text(yaml.safe_dump(TINY | {"data": data, "run": TINY["run"] | where | run}))
    return path


def known(monkeypatch, right):
    """Let a model be right where a function of example, tokens and place says so."""

    def make_answer(graphdef, rows):
        def answer(params, rest, draw, split, count):
            assert split == "test"
            examples = [draw(split, i) for i in range(count)]
            fields = ("weights", "places", "origins")
            weights, places, origins = (np.stack([getattr(e, x) for e in examples]) for x in fields)
            marks = np.stack([right(e, places[i]) for i, e in enumerate(examples)])
            return evaluate.Answers(np.ones(marks.shape), marks, weights, places - origins)

        return answer

    monkeypatch.setattr(evaluate, "make_answer", make_answer)
    monkeypatch.setattr(evaluate, "measure_heads", lambda model, tokens: None)
