"""Generation in PyTorch matches full passes and the sampling distribution."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers.generation_cases import (
    LAYERS,
    LOGITS,
    PROMPTS,
    SAMPLED,
    SAMPLING,
    check_frequencies,
    convert_to_torch,
    distribution,
    make_model,
)
from mc_torch import LanguageModel, generate, sample

torch.set_num_threads(1)


def torch_tokens(model: LanguageModel, prompts: Any, count: int, **options: Any) -> np.ndarray:
    return torch.stack(list(generate(model, prompts, count, **options)), dim=1).numpy()


REPEATED = ("linear-grm", "linear-soup", "swla-mean")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in REPEATED else ()) for n in LAYERS],
)
def test_generation_rows_match_full_passes(name):
    """Greedy and sampled, in a batch and as single rows."""
    torch_model = convert_to_torch(make_model(name))
    for options in ({}, SAMPLED):
        together = torch_tokens(torch_model, PROMPTS, 10, block=4, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = torch_tokens(torch_model, [prompt], 10, rows=[row], **options)
            np.testing.assert_array_equal(together[row], alone[0])
        if options:
            continue
        for row, prompt in enumerate(PROMPTS):
            tokens = list(prompt)
            for _ in range(10):
                with torch.no_grad():
                    tokens.append(int(torch_model(torch.tensor([tokens]))[0, -1].argmax()))
            assert together[row].tolist() == tokens[len(prompt) :]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLING)
def test_sampling_matches_distribution(temperature, top_k, top_p):
    """A shared generator draws for rows in sequence, as separate ones do."""
    draws = 20_000
    rng = [torch.Generator().manual_seed(1)] * draws
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(draws, 7)
    actual = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
    check_frequencies(actual.numpy(), distribution(LOGITS, temperature, top_k, top_p))


def test_greedy_takes_first_of_equal_logits_and_flags_non_finite():
    bad = LOGITS.copy()
    bad[0] = np.nan
    logits = torch.tensor(np.stack([LOGITS, np.zeros(7), bad, np.full(7, np.inf)]))
    assert sample(logits).tolist() == [5, 0, -1, -1]
    with pytest.raises(ValueError, match=r"rng = None: must be given for temperature = 1.0"):
        sample(logits, temperature=1.0)


def test_seed_determines_generation():
    config = make_model("linear-none", jnp.float32).config
    torch.manual_seed(0)
    model = LanguageModel(config)
    prompts, options = [PROMPTS[0]] * 2, {"temperature": 2.0}
    first = torch_tokens(model, prompts, 20, seed=7, **options)
    torch.manual_seed(1)  # independent of the global generator
    np.testing.assert_array_equal(first, torch_tokens(model, prompts, 20, seed=7, **options))
    assert (first != torch_tokens(model, prompts, 20, seed=8, **options)).any(axis=1).all()
    assert (first[0] != first[1]).any()
    swapped = torch_tokens(model, prompts, 20, seed=7, rows=[1, 0], **options)
    np.testing.assert_array_equal(first, swapped[::-1])


def test_generation_does_not_record_gradients():
    model = LanguageModel(make_model("linear-none", jnp.float32).config)
    steps = generate(model, [[1, 2]], 3, cache_dtype=torch.bfloat16)
    assert not next(steps).requires_grad
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="max_new_tokens = 0: must be >= 1"):
        generate(model, [[1, 2]], 0)
