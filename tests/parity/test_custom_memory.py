"""A custom memory works wherever built-in memories do."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import mc_jax
import mc_torch
from helpers.cases import assert_close
from helpers.tiny_run import TINY, mc, write_config
from mc_core import LinearConfig, MCConfig, MemoryConfig, TitansConfig, register_memory
from mc_core.aggregations import AGGREGATIONS
from mc_core.memories import MEMORIES
from parity.check import check_case
from parity.grids import full
from train.user_modules import VARIABLE, import_modules

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_memory.py"
TOKENS = 13


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """Import the example as `mc --import` does, and unregister it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "")
        import_modules([str(EXAMPLE)])
        yield sys.modules["custom_memory"]
    del sys.modules["custom_memory"], MEMORIES["decayed_delta"]
    del mc_jax.backends.base.BACKENDS["decayed_delta"]
    del mc_torch.backends.base.BACKENDS["decayed_delta"]


def make_config(example: ModuleType, aggregation: str, **options: Any) -> MCConfig:
    memory = example.DecayedDeltaConfig()
    fields = {"segment_size": 4, "chunk_size": 3, "conv_width": 3} | options
    return MCConfig(8, 2, memory, aggregation, **fields)


def inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, TOKENS, 8))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("start", ["checkpoint", "restart"])
def test_custom_memory_split_stream_matches_full_pass(example, aggregation, start):
    torch.manual_seed(0)
    config = make_config(example, aggregation, state_init_mode=start)
    layer = mc_torch.MemoryCachingLayer(config, dtype=torch.float64)
    x = torch.from_numpy(inputs())
    whole = layer(x)
    cache, parts = layer.init_cache(2, TOKENS), []
    for part in x.split([5, 1, 7], dim=1):
        y, cache = layer.extend(part, cache)
        parts.append(y)
    assert_close(torch.cat(parts, 1).detach(), whole.detach(), 1e-12)
    assert_close(layer.inspect(x)[0].detach(), whole.detach(), 1e-12)


def test_custom_memory_equals_titans_of_depth_one_without_momentum(example):
    """`||W k - v||²` has twice the gradient, so Titans uses half the step."""
    rng = np.random.default_rng(1)
    q, k, v, u = (torch.from_numpy(rng.standard_normal((2, TOKENS, 2, 4))) for _ in range(4))
    k = k / k.norm(dim=-1, keepdim=True)
    step, retention = (torch.from_numpy(rng.uniform(0.1, 0.9, (2, TOKENS, 2))) for _ in range(2))
    initial = (torch.zeros(2, 4, 4, dtype=torch.float64),)
    titans = TitansConfig(depth=1, residual=False, inner_clip=None)
    mine = MCConfig(8, 2, example.DecayedDeltaConfig(), segment_size=4, chunk_size=3)
    theirs = MCConfig(8, 2, titans, segment_size=4, chunk_size=3)
    momentum = torch.zeros_like(step)
    for method in ("chunked", "recurrent"):
        actual = mc_torch.memory_caching(
            q, k, v, u, initial, mc_torch.Coefficients(step, retention), mine, method=method
        )
        expected = mc_torch.memory_caching(
            q, k, v, u, initial, mc_torch.Coefficients(step / 2, retention, momentum), theirs
        )
        assert_close(actual.output, expected.output, 1e-12)


@pytest.mark.slow
def test_custom_memory_trains_and_generates_through_the_command(example, tmp_path, monkeypatch):
    layer = {**TINY["model"]["layer"], "memory": {"kind": "decayed_delta"}}
    config = write_config(tmp_path, model={**TINY["model"], "layer": layer})
    assert mc(monkeypatch, "--import", EXAMPLE, "train", config) == 0
    run = tmp_path / "runs" / "tiny"
    assert mc(monkeypatch, "--import", EXAMPLE, "generate", run, "--prompt", "the") == 0


@pytest.mark.slow
def test_custom_memory_passes_parity_check():
    words = ["--import", str(EXAMPLE), "parity", "check", "--full", "--kind", "decayed_delta"]
    done = subprocess.run([sys.executable, "-m", "train", *words], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"all equal: " in done.stdout


@pytest.mark.parametrize("flag", ["gradient_uses_weights", "delta_rule"])
def test_previous_token_excludes_gradients_of_the_memory(flag):
    """Their updates would have one row more than their errors."""
    fields = {"kind": "both", "description": "", "uses_previous_token": True, flag: True}
    wrong = type("Wrong", (LinearConfig,), fields)
    with pytest.raises(ValueError, match=f"Wrong sets {flag} and uses_previous_token"):
        register_memory(dataclass(frozen=True)(wrong))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_custom_memory_passes_full_parity_grid(example):
    cases = [c for c in full() if c.layer.memory.kind == "decayed_delta" and c.dtype == "float64"]
    assert len(cases) == 30
    for case in cases[:1]:
        assert all(difference.ok for difference in check_case(case).differences), case


def test_import_failure_is_a_one_line_error(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_at_all\n")
    assert mc(monkeypatch, "--import", broken, "variants") == 2
    assert "no_such_module_at_all" in capsys.readouterr().err


def test_registration_rejects_invalid_memories():
    @dataclass(frozen=True)
    class Nameless(MemoryConfig):
        coefficients: str = "token"

    with pytest.raises(ValueError, match="Nameless must define kind, description, ranges"):
        register_memory(Nameless)

    @dataclass(frozen=True)
    class Copy(LinearConfig):
        kind = "linear"

    with pytest.raises(
        ValueError, match=r"kind = 'linear' is already registered by mc_core\.memory_kinds\.Linear"
    ):
        register_memory(Copy)
    assert MEMORIES["linear"] is LinearConfig


def test_kind_without_backend_is_rejected():
    @register_memory
    @dataclass(frozen=True)
    class Orphan(LinearConfig):
        kind = "orphan"

    try:
        with pytest.raises(ValueError, match="'orphan': mc_torch has no backend"):
            mc_torch.MemoryCachingLayer(MCConfig(8, 2, Orphan()))(torch.zeros(1, 3, 8))
    finally:
        del MEMORIES["orphan"]
