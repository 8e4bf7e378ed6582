"""Models, prompts and references of the tests of generation, for both frameworks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_torch
from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_jax import LanguageModel, generate, sample
from parity.weights import jax_weights, load_torch, to_torch

torch.set_num_threads(1)

VOCAB = 13
LAYERS = {
    "linear-none": MCConfig(8, 2, LinearConfig(coefficients="token"), "none"),
    "linear-grm": MCConfig(8, 2, LinearConfig(), "grm", state_init_mode="restart"),
    "linear-soup": MCConfig(8, 2, LinearConfig(), "soup", conv_width=3),
    "swla-ssc": MCConfig(8, 2, SWLAConfig(), "ssc"),
    "swla-mean": MCConfig(8, 2, SWLAConfig(), "mean", conv_width=2),
    "dla-residual": MCConfig(8, 2, DLAConfig(depth=2, expansion=1), "residual"),
    "titans-grm": MCConfig(8, 2, TitansConfig(depth=2, expansion=1), "grm", conv_width=4),
}
PROMPTS = [[1, 7, 3, 3, 9, 0, 12, 5, 2, 8, 4], [6], [2, 11, 2, 10, 5]]
SAMPLED = {"temperature": 2.0, "top_k": 11, "top_p": 0.97, "seed": 5}


def make_model(name: str = "linear-grm", dtype: Any = jnp.float64, layers: int = 1) -> Any:
    """Build a model with untied embeddings; with tied ones, greedy decoding repeats one token."""
    layer = MCConfig.from_dict(LAYERS[name].to_dict() | {"segment_size": 4, "chunk_size": 3})
    config = ModelConfig(VOCAB, num_layers=layers, layer=layer, ffn_width=16, tie_embeddings=False)
    return LanguageModel(config, rngs=nnx.Rngs(2), param_dtype=dtype)


def generate_tokens(model: LanguageModel, prompts: Any, count: int, **options: Any) -> np.ndarray:
    """Return the tokens of `generate`, [b, count]."""
    steps = list(generate(model, prompts, count, **options))
    assert all(step.shape == (len(prompts),) and step.dtype == jnp.int32 for step in steps)
    return np.stack(steps, axis=1)


def step_keys(seed: int, rows: Any, step: int) -> jax.Array:
    """Return the random keys of a step, by definition."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), r), step) for r in rows]
    return jnp.stack(keys)


def convert_to_torch(model: LanguageModel) -> mc_torch.LanguageModel:
    """Convert a JAX model to PyTorch, in float64."""
    torch_model = mc_torch.LanguageModel(model.config, dtype=torch.float64)
    load_torch(torch_model, to_torch(jax_weights(model)))
    return torch_model


def generate_by_full_passes(
    torch_model: mc_torch.LanguageModel,
    prompts: list[list[int]],
    count: int,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Generate each token by a full pass over all previous tokens.

    The passes run in PyTorch, the sampling in JAX. Returns [b, count].
    """
    ends, rows = np.array([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens = np.zeros((len(prompts), ends.max() + count), np.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    for step in range(count):
        at = ends + step
        with torch.no_grad():
            logits = torch_model(torch.from_numpy(tokens[:, : at.max()])).numpy()
        chosen = sample(jnp.asarray(logits[rows, at - 1]), step_keys(seed, rows, step), **options)
        tokens[rows, at] = chosen
    return np.stack([row[end : end + count] for row, end in zip(tokens, ends, strict=True)])


def distribution(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """Return the probabilities of all ids under the sampling options."""
    shares = np.exp((logits - logits.max()) / temperature)
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    shares /= shares[ids].sum()
    selected, total = [], 0.0
    for i in ids:
        if total >= (top_p or 1.0):
            break
        selected.append(i)
        total += shares[i]
    out = np.zeros(len(logits))
    out[selected] = shares[selected] / shares[selected].sum()
    return out


SAMPLING = [
    (1.0, None, None),
    pytest.param(0.5, None, None, marks=pytest.mark.slow),
    (2.0, 3, None),
    (1.0, None, 0.6),
    (0.7, 4, 0.8),
    (3.0, 100, 1.0),
    pytest.param(1.0, 3, 0.99, marks=pytest.mark.slow),
    (1.0, None, 1e-9),
]
LOGITS = np.array([0.3, 1.9, -1.0, 1.9, 0.3, 2.5, -4.0])  # with ties at the truncation thresholds


def check_frequencies(samples: np.ndarray, expected: np.ndarray) -> None:
    """Compare draws with probabilities, within 4.5 standard deviations."""
    shares = np.bincount(samples, minlength=len(expected)) / len(samples)
    assert (shares[expected == 0] == 0).all(), (shares, expected)
    limit = 4.5 * np.sqrt(expected * (1 - expected) / len(samples))
    assert (np.abs(shares - expected) <= limit + 1e-12).all(), (shares, expected)
