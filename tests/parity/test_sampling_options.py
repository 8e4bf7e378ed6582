"""Min-p truncation and the repetition penalty, in both packages, against values by hand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax
import mc_torch
from helpers.generation_cases import (
    LOGITS,
    PROMPTS,
    VOCAB,
    check_frequencies,
    convert_to_torch,
    make_model,
)

torch.set_num_threads(1)
both_packages = pytest.mark.parametrize("package", ["jax", "torch"])
DRAWS = 4_000


def sample(package: str, logits: np.ndarray, seen: Any = None, **options: Any) -> np.ndarray:
    """Return the ids that `sample` of a package draws from logits [b, s]."""
    if package == "jax":
        keys = jax.random.split(jax.random.key(1), len(logits))
        seen = None if seen is None else jnp.asarray(seen)
        return np.asarray(mc_jax.sample(jnp.asarray(logits), keys, seen=seen, **options))
    rng = [torch.Generator().manual_seed(1)] * len(logits)
    seen = None if seen is None else torch.from_numpy(seen)
    return mc_torch.sample(torch.from_numpy(logits), rng, seen=seen, **options).numpy()


def shares(logits: dict[int, float]) -> np.ndarray:
    """Return the softmax of the given logits over all ids; other ids have probability 0."""
    out = np.zeros(len(LOGITS))
    for i, logit in logits.items():
        out[i] = math.exp(logit) / sum(map(math.exp, logits.values()))
    return out


# Logits 0.3, 1.9, -1.0, 1.9, 0.3, 2.5, -4.0. At temperature 1, id 1 has exp(-0.6) = 0.549 times the
# probability of id 5, and id 0 has exp(-2.2) = 0.111 times that probability.
@both_packages
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0, "min_p": 0.5}, {1: 1.9, 3: 1.9, 5: 2.5}),
        ({"temperature": 1.0, "min_p": 0.6}, {5: 2.5}),
        # exp(-2.2 / 2) = 0.333 and exp(-3.5 / 2) = 0.174: the temperature comes first.
        ({"temperature": 2.0, "min_p": 0.3}, {0: 0.15, 1: 0.95, 3: 0.95, 4: 0.15, 5: 1.25}),
        # The probabilities are 0.43, 0.23, 0.23, 0.05 and 0.05 for ids 5, 1, 3, 0 and 4.
        ({"temperature": 1.0, "top_p": 0.95, "min_p": 0.5}, {1: 1.9, 3: 1.9, 5: 2.5}),
        # After min-p, 5 and 1 would have 0.74, and top-p would drop 3.
        ({"temperature": 1.0, "top_p": 0.7, "min_p": 0.5}, {1: 1.9, 3: 1.9, 5: 2.5}),
        ({"temperature": 1.0, "top_k": 2, "min_p": 0.1}, {1: 1.9, 5: 2.5}),
    ],
)
def test_min_p_keeps_ids_near_the_most_likely_one(package, options, expected):
    logits = np.broadcast_to(LOGITS.astype(np.float32), (DRAWS, len(LOGITS))).copy()
    check_frequencies(sample(package, logits, **options), shares(expected))


@both_packages
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(package):
    seen = np.zeros((3, 7), bool)
    seen[0, [5, 1]] = True  # 2.5 and 1.9 become 1.25 and 0.95, so 3 remains the largest
    seen[1, [1, 3, 5]] = True  # 1.25 is still the largest
    seen[2] = True
    logits = np.stack([LOGITS, LOGITS, -1 - np.arange(7.0)]).astype(np.float32)
    assert sample(package, logits, seen, repetition_penalty=2.0).tolist() == [3, 5, 0]
    # A logit of -1 becomes -4, below the unseen -2.
    seen[2] = np.arange(7) == 0
    assert sample(package, logits, seen, repetition_penalty=4.0)[2] == 1
    logits = np.broadcast_to(LOGITS.astype(np.float32), (DRAWS, 7)).copy()
    actual = sample(
        package, logits, seen[:1].repeat(DRAWS, 0), temperature=1.0, repetition_penalty=2.0
    )
    penalized = {0: 0.3, 1: 0.95, 2: -1.0, 3: 1.9, 4: 0.3, 5: 1.25, 6: -4.0}
    check_frequencies(actual, shares(penalized))


@pytest.mark.usefixtures("float64")
def test_generation_penalizes_ids_of_prompt_and_completion():
    """Greedy decoding in both packages against repeated full passes and a loop over ids."""
    model, penalty = make_model(), 1.7
    torch_model = convert_to_torch(model)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                logits = torch_model(torch.tensor([ids]))[0, -1].tolist()
            for i in set(ids):
                logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
            ids.append(max(range(VOCAB), key=lambda i: (logits[i], -i)))
        expected.append(ids[len(prompt) :])
    options = {"repetition_penalty": penalty, "block": 1}
    for package, used in ((mc_jax, model), (mc_torch, torch_model)):
        steps = [np.asarray(x) for x in package.generate(used, PROMPTS, 10, **options)]
        np.testing.assert_array_equal(np.stack(steps, axis=1), expected)
    plain = torch.stack(list(mc_torch.generate(torch_model, PROMPTS, 10)), dim=1)
    assert (plain.numpy() != expected).any()


@both_packages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": -0.1}, r"min_p = -0.1: must be in \[0, 1\]"),
        ({"min_p": 1.5}, r"min_p = 1.5: must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: must be finite and > 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty = nan: must be finite"),
        ({"repetition_penalty": 1.2}, "seen = None: must be given for repetition_penalty = 1.2"),
    ],
)
def test_invalid_sampling_options_are_refused(package, options, message):
    with pytest.raises(ValueError, match=message):
        sample(package, LOGITS[None], **options)


@pytest.mark.usefixtures("float64")
def test_prefill_reads_prompts_of_different_lengths():
    """The logits equal those of single full passes, and the cache continues every row."""
    model = make_model("linear-none")
    torch_model = convert_to_torch(model)
    with torch.no_grad():
        passes = [torch_model(torch.tensor([[*prompt, 3]]))[0, -2:].numpy() for prompt in PROMPTS]
        ours, cache = mc_torch.prefill(torch_model, PROMPTS, 12, block=4)
        after, _ = torch_model.extend(torch.full((3, 1), 3), cache)
    theirs, _ = mc_jax.prefill(model, PROMPTS, 12, block=4)
    for row, expected in enumerate(passes):
        np.testing.assert_allclose(ours[row], expected[0], atol=1e-10)
        np.testing.assert_allclose(theirs[row], expected[0], atol=1e-10)
        np.testing.assert_allclose(after[row, 0], expected[1], atol=1e-10)
    for package, used in ((mc_jax, model), (mc_torch, torch_model)):
        with pytest.raises(ValueError, match="max_tokens = 10: must be >= 11"):
            package.prefill(used, PROMPTS, 10)
        with pytest.raises(ValueError, match="number of prompts = 0: must be >= 1"):
            package.prefill(used, [], 10)
