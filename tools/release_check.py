"""`python -m tools.release_check`: build the distributions, and test them in fresh environments.

Two builds must be equal byte for byte and pass `twine check --strict`. The wheel is installed with
each extra; then the smoke tests of that extra run in an empty folder. Exit code 1 if one fails.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.distributions import build

TORCH = "torch==2.13.0"  # pinned as in the Makefile
LAYER = """
from importlib.util import find_spec
from mc_core import MCConfig, TitansConfig
config = MCConfig(d_model=8, num_heads=2, memory=TitansConfig(), segment_size=8)
"""
JAX_LAYER = """
from flax import nnx
import jax.numpy as jnp
from mc_jax import MemoryCachingLayer
assert find_spec("torch") is None
y = MemoryCachingLayer(config, rngs=nnx.Rngs(0))(jnp.ones((2, 20, 8)))
assert y.shape == (2, 20, 8) and jnp.isfinite(y).all(), y
"""
TORCH_LAYER = """
import torch
from mc_torch import MemoryCachingLayer
assert find_spec("jax") is None
y = MemoryCachingLayer(config)(torch.ones(2, 20, 8))
assert y.shape == (2, 20, 8) and y.isfinite().all(), y
"""
HF_MODEL = """
import torch
from transformers import AutoModelForCausalLM
from mc_torch.hf import MemoryCachingConfig, MemoryCachingForCausalLM
assert find_spec("jax") is None
config = MemoryCachingConfig(vocab_size=256, num_layers=1, layer=config)
MemoryCachingForCausalLM(config).save_pretrained("folder")
model = AutoModelForCausalLM.from_pretrained("folder")
assert model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4).shape == (1, 7)
"""
TRAIN = "demo_none run.steps=3 optimizer.warmup_steps=1 data.validation_bytes=4096"
NEED_TRAIN = "is not installed: pip install 'memory-caching-jax[train]'"


@dataclass(frozen=True)
class SmokeTest:
    """A command of an environment.

    Attributes:
        words: program and arguments.
        code: expected exit code.
        text: text that the output must contain.
    """

    words: tuple[str, ...]
    code: int = 0
    text: str = ""


def python(source: str) -> SmokeTest:
    """Return a smoke test of Python code."""
    return SmokeTest(("python", "-c", source))


def mc(words: str, code: int = 0, text: str = "") -> SmokeTest:
    """Return a smoke test of the command `mc`."""
    return SmokeTest(("mc", *words.split()), code, text)


# An environment is extended in steps: (requirements, smoke tests). {} is the wheel.
ENVIRONMENTS: dict[str, list[tuple[list[str], list[SmokeTest]]]] = {
    "jax": [(["{}[jax]"], [python(LAYER + JAX_LAYER), mc("configs", 2, NEED_TRAIN)])],
    "torch": [(["{}[torch]", TORCH], [python(LAYER + TORCH_LAYER), mc("configs", 2, NEED_TRAIN)])],
    "hf": [(["{}[hf]", TORCH], [python(LAYER + HF_MODEL)])],
    "train": [
        (
            ["{}[train]"],
            [
                mc("configs", text="mqar/base"),
                mc(f"train {TRAIN}", text="bits/byte"),
                mc("evaluate runs/demo_none", text="bits/byte"),
                mc("train demmo", 2, "nearest names: demo, demo_none"),
                mc("parity check", 2, "torch"),
            ],
        ),
        (
            ["{}[torch]", TORCH],
            [mc("parity check --kind linear --aggregation none", text="all equal")],
        ),
    ],
}


def main() -> int:
    """Run all checks, and return the exit code."""
    start = time.monotonic()
    failures = 0
    with tempfile.TemporaryDirectory(prefix="release-") as scratch:
        folder = Path(scratch)
        for name, problem in checks(folder):
            print(f"{time.monotonic() - start:5.0f} s  {name}: {problem or 'passed'}", flush=True)
            failures += bool(problem)
    print(f"{failures} failures, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


def checks(folder: Path) -> Iterator[tuple[str, str]]:
    """Run the checks in a folder, and yield the name and the problem of each, or ''."""
    first, second = (build(folder / name) for name in ("first", "second"))
    for one, other in zip(first, second, strict=True):
        equal = one.read_bytes() == other.read_bytes()
        yield f"two builds of {one.name}", "" if equal else "differ"
    yield "twine", run(sys.executable, "-m", "twine", "check", "--strict", *map(str, first))
    for name, steps in ENVIRONMENTS.items():
        programs = folder / name / "bin"
        empty = folder / f"{name}-empty"
        empty.mkdir()
        yield f"{name}: environment", run(sys.executable, "-m", "venv", str(folder / name))
        for requirements, tests in steps:
            words = ["-m", "pip", "install", "--quiet", *(x.format(first[1]) for x in requirements)]
            shown = " ".join(requirements).format("wheel")
            yield f"{name}: pip install {shown}", run(str(programs / "python"), *words)
            for test in tests:
                program, *words = test.words
                shown = program if program == "python" else " ".join(test.words)
                yield f"{name}: {shown}", run(str(programs / program), *words, cwd=empty, test=test)


def run(*command: str, cwd: Path | None = None, test: SmokeTest = SmokeTest(())) -> str:
    """Run a command, and return its problem, or ''."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != test.code:
        return f"exit code {done.returncode}, expected {test.code}\n{output}"
    return "" if test.text in output else f"{test.text!r} is missing in\n{output}"


if __name__ == "__main__":
    sys.exit(main())
