"""A run that trains in seconds: its text, its configuration, and the command in this process."""

import random
import sys
from pathlib import Path

import pytest
import yaml

WORDS = "the memory keeps every segment of a long text and a token reads what it needs from it\n"
TINY = {
    "data": {"window": 16, "validation_fraction": 0.3, "validation_bytes": 500},
    "model": {
        "vocab_size": 256,
        "num_layers": 1,
        "ffn_width": 16,
        "layer": {
            "d_model": 8,
            "num_heads": 2,
            "memory": {"kind": "linear"},
            "aggregation": "grm",
            "segment_size": 8,
            "chunk_size": 8,
        },
    },
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
    "run": {
        "steps": 12,
        "batch_size": 2,
        "log_every": 3,
        "save_every": 4,
        "validate_every": 6,
        "sample_tokens": 0,
    },
}


# The command in a separate process, without plots, which take long.
COMMAND = (
    sys.executable,
    "-c",
    "import train.tasks.text as text; text.draw_curves = text.draw_gates = lambda *_: None; "
    "from train.cli import main; main()",
)


def write_documents(folder: Path, count: int = 16, words: int = 60) -> Path:
    """Write distinct documents of words in random order."""
    folder.mkdir(parents=True)
    for number in range(count):
        drawn = random.Random(number).choices(WORDS.split(), k=words)
        (folder / f"{number}.txt").write_text(f"{number}: {' '.join(drawn)}\n")
    return folder


def write_config(folder: Path, **keys: object) -> Path:
    """Write documents and `tiny.yaml`; `keys` are extra top-level sections or values."""
    corpus = write_documents(folder / "text")
    data = TINY["data"] | {"corpus": str(corpus)}
    run = TINY["run"] | {"directory": str(folder / "runs" / "tiny")}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"data": data, "run": run} | keys))
    return path


def untrained_run(folder: Path, *overrides: str, **sections: object) -> Path:
    """Write a run of an attention model that has not trained."""
    from flax import nnx

    from mc_jax import LanguageModel
    from parity.weights import jax_weights
    from train.config import load_config
    from train.convert import write_run

    config = load_config(write_config(folder, **sections), ["model.mixers=[attention]", *overrides])
    model = LanguageModel(config.model, rngs=nnx.Rngs(config.run.seed))
    write_run(folder / "run", config, jax_weights(model))
    return folder / "run"


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable plots, which take longer than a tiny training."""
    for name in ("text.draw_curves", "text.draw_gates", "recall.draw_curves"):
        monkeypatch.setattr(f"train.tasks.{name}", lambda *_: None)


def mc(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the command here and return its exit code."""
    from train.cli import main

    monkeypatch.setattr(sys, "argv", ["mc", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def fails(config: Path, monkeypatch, capsys, message: str, *words: object) -> None:
    """Check a command's exit code 2, one line on stderr, and unchanged files."""
    before = snapshot(config.parent)
    assert mc(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert snapshot(config.parent) == before
