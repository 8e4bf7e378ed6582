"""The code of the streaming page runs in both frameworks and matches full passes."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_core.tree_utils import flatten
from mc_core.weights import to_torch
from mc_jax.pretrained import get_weights

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "stream.md"
BLOCKS = re.findall(r"^```python\n# (jax|torch)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
LAYER = MCConfig(8, 2, TitansConfig(expansion=1), "ssc", segment_size=8, chunk_size=4, conv_width=4)


def models() -> tuple[mc_jax.LanguageModel, mc_torch.LanguageModel]:
    config = ModelConfig(17, 1, LAYER)
    left, right = mc_jax.LanguageModel(config, rngs=nnx.Rngs(0)), mc_torch.LanguageModel(config)
    weights = to_torch(get_weights(left))
    right.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    return left, right


def greedy(model: mc_torch.LanguageModel, prompt: np.ndarray, count: int) -> np.ndarray:
    """Decode greedily by repeated full passes."""
    tokens = torch.tensor(prompt)
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :].numpy()


def extend_compiled(model: mc_jax.LanguageModel, *given: Any, **options: Any) -> Any:
    """Extend in one compiled program."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *given, **kw: EXTEND(nnx.merge(graphdef, state), *given, **kw))
    return run(state, *given, **options)


EXTEND = mc_jax.LanguageModel.extend


@pytest.mark.slow
def test_code_blocks_run_and_frameworks_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mc_jax.LanguageModel, "extend", extend_compiled)
    left, right = models()
    prompt = np.random.default_rng(0).integers(17, size=(2, 11)).astype(np.int32)
    spaces: dict[str, dict[str, Any]] = {
        "jax": {"model": left, "prompt": jnp.asarray(prompt), "jnp": jnp},
        "torch": {"model": right, "prompt": torch.tensor(prompt), "torch": torch},
    }
    assert [name for name, _ in BLOCKS] == [
        *("jax", "torch", "jax", "jax", "torch"),
        *("torch", "jax", "torch"),
    ]
    assert len(BLOCKS) == PAGE.read_text().count("```python")
    with torch.no_grad():
        generated = greedy(right, prompt, 16)
        logits, alone = right(torch.tensor(prompt)), right(torch.tensor([[5, 7, 2]]))[0]
    for number, (name, code) in enumerate(BLOCKS):
        with torch.no_grad():
            exec(code, spaces[name])
        space = spaces[name]
        if number < 2:
            np.testing.assert_array_equal(np.concatenate(space["new"], axis=1), generated)
        elif number == 2:
            np.testing.assert_allclose(space["logits"], logits, atol=1e-5)
            states = space["cache"][0].state.weights
            assert all(len(weight.sharding.device_set) == 2 for weight in states)
            assert not any(weight.sharding.is_fully_replicated for weight in states)
        elif number < 5:
            np.testing.assert_allclose(space["logits"][0, 2:], alone, atol=1e-5)
            assert space["cache"][0].position.tolist() == [3, 5]
        elif number == 5:
            assert space["samples"][0].position.tolist() == [3] * 4
            assert space["beams"][0].position.tolist() == [5, 5]
    # The file on disk is now from PyTorch, and JAX continues it.
    crossed = mc_jax.load_cache("stream.safetensors", left)
    for (name, one), (_, other) in zip(
        flatten(crossed), flatten(spaces["jax"]["cache"]), strict=True
    ):
        assert one.dtype == other.dtype, name
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


def test_code_blocks_are_short():
    """At most ten lines each for prefill and decoding, without imports."""
    for _, code in BLOCKS[:2]:
        lines = [line for line in code.splitlines() if line and "import" not in line]
        assert len(lines) <= 10
