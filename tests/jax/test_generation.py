"""Generation: greedy decoding matches full passes, sampling matches its distribution."""

from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.generation_cases import (
    LAYERS,
    LOGITS,
    PROMPTS,
    SAMPLED,
    SAMPLING,
    VOCAB,
    check_frequencies,
    convert_to_torch,
    distribution,
    generate_by_full_passes,
    generate_tokens,
    make_model,
    step_keys,
)
from mc_core.generation import bucket, make_blocks
from mc_jax import generate, sample
from mc_jax.generation import _make_programs


def first_cache(steps: Any) -> Any:
    """Return the cache of the first block of an unstarted iterator."""
    cache, _, _ = steps.gi_frame.f_locals["state"]
    return cache[0]


QUICK = ("linear-soup",)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS],
)
def test_generation_matches_repeated_full_passes(name):
    """Greedy and sampled, for rows of different lengths, over many segments."""
    model = make_model(name)
    torch_model = convert_to_torch(model)
    for options in ({}, SAMPLED):
        actual = generate_tokens(model, PROMPTS, 14, block=4, **options)
        np.testing.assert_array_equal(
            actual, generate_by_full_passes(torch_model, PROMPTS, 14, **options)
        )
    assert len(np.unique(actual)) > 6


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "strict")
def test_generation_rows_are_independent():
    model = make_model(layers=2)
    for options in ({"block": 1}, SAMPLED | {"block": 1}):
        together = generate_tokens(model, PROMPTS, 14, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = generate_tokens(model, [prompt], 14, rows=[row], **options)
            np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_left_and_right_padded_prompts_match_single_rows():
    """A batch that is padded on either side and passed to `extend` matches `generate`."""
    model = make_model()
    graph, state = nnx.split(model)
    extend = jax.jit(lambda s, *args, padding: nnx.merge(graph, s).extend(*args, padding=padding))
    ways = ((0, {}), (5, {"temperature": 2.0}))
    expected = [generate_tokens(model, PROMPTS, 6, seed=seed, **options) for seed, options in ways]
    width = max(map(len, PROMPTS))
    alone = np.broadcast_to(np.arange(width) > 0, (3, width))  # exactly one token
    for left in (True, False):
        tokens, padding = np.full((3, width), 4, np.int32), np.ones((3, width), bool)
        for row, prompt in enumerate(PROMPTS):
            start = (width - len(prompt)) * left
            place = slice(start, start + len(prompt))
            tokens[row, place], padding[row, place] = prompt, False
        logits, filled = extend(state, tokens, model.init_cache(3, 32), padding=padding)
        last = [width - 1] * 3 if left else [len(prompt) - 1 for prompt in PROMPTS]
        for (seed, options), wanted in zip(ways, expected, strict=True):
            after, cache = logits[np.arange(3), np.array(last)], filled
            for step in range(6):
                new = sample(after, step_keys(seed, range(3), step), **options)
                np.testing.assert_array_equal(new, wanted[:, step])
                tokens = np.where(alone, 4, np.asarray(new)[:, None])
                after, cache = extend(state, tokens, cache, padding=alone)
                after = after[:, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_generation_is_independent_of_block_width():
    model = make_model("linear-soup")
    expected = generate_tokens(model, PROMPTS, 10, **SAMPLED)
    for block in (1, 3):
        np.testing.assert_array_equal(
            generate_tokens(model, PROMPTS, 10, block=block, **SAMPLED), expected
        )


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLING)
def test_sampling_matches_distribution(temperature, top_k, top_p):
    draws = 40_000
    rng = jax.random.split(jax.random.key(1), draws)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 7))
    actual = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
    check_frequencies(np.asarray(actual), distribution(LOGITS, temperature, top_k, top_p))


def test_greedy_takes_first_of_equal_logits_and_flags_non_finite():
    bad = LOGITS.copy()
    bad[0] = np.nan
    logits = np.stack([LOGITS, np.zeros(7), bad, np.full(7, np.inf)]).astype(np.float32)
    assert sample(jnp.asarray(logits)).tolist() == [5, 0, -1, -1]
    rng = jax.random.split(jax.random.key(0), 4)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        tokens = sample(jnp.asarray(logits), rng, temperature=9.0, **options)
        assert tokens.tolist() == [5, 0, -1, -1]


def test_seed_determines_generation():
    """The same seed gives the same tokens; other seeds and rows give others."""
    model, options = make_model("linear-none", jnp.float32), {"temperature": 2.0}
    prompts = [PROMPTS[0]] * 2
    first = generate_tokens(model, prompts, 20, seed=7, **options)
    np.testing.assert_array_equal(first, generate_tokens(model, prompts, 20, seed=7, **options))
    assert (first != generate_tokens(model, prompts, 20, seed=8, **options)).any(axis=1).all()
    assert (first[0] != first[1]).any()
    swapped = generate_tokens(model, prompts, 20, seed=7, rows=[1, 0], **options)
    np.testing.assert_array_equal(first, swapped[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("restored", [False, True])
def test_prompt_lengths_share_compiled_programs(restored, caplog):
    """Prompts of 17 to 32 tokens share a program; early stops and restored parameters reuse it.

    Restored parameters are committed to a device, and so are all results.
    """
    model, used = make_model("linear-none", jnp.float32), 0
    if restored:
        nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    _make_programs.cache_clear()
    for block, lengths, programs in ((1, (5,), 1), (512, (17, 20, 25, 32), 2), (16, (48,), 3)):
        for length in lengths:
            prompt = np.arange(length) % VOCAB
            with jax.log_compiles():
                steps = generate(model, [prompt], 30, block=block)
                used = caplog.text.count("Compiling jit(extend)")
                assert len(list(islice(steps, 3))) == 3
            assert caplog.text.count("Compiling jit(extend)") == used, "unexpected compilation"
        assert used == programs
    assert [bucket(n, 8) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]


@pytest.mark.slow
def test_restored_model_offloads_cached_memories(caplog):
    """Cached memories stay on the host, the tokens are the same, and nothing is recompiled."""
    model = make_model("linear-grm", jnp.float32)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    near = generate_tokens(model, PROMPTS, 9)
    steps = generate(model, PROMPTS, 9, cache_device="host")
    weights = first_cache(steps).stored.weights
    assert {w.sharding.memory_kind for w in weights} == {"pinned_host"}
    with jax.log_compiles():
        np.testing.assert_array_equal(np.stack(list(steps), axis=1), near)
    assert "Compiling jit(extend)" not in caplog.text


def test_prompt_blocks_contain_every_token_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompts = [rng.integers(0, 99, n) for n in rng.integers(1, 40, 3)]
        blocks = make_blocks(prompts, 8)
        assert {block.tokens.shape[1] for block in blocks[:-1]} <= {8}
        tokens, padding = (np.concatenate(x, axis=1) for x in zip(*blocks, strict=True))
        for row, prompt in enumerate(prompts):
            np.testing.assert_array_equal(tokens[row][~padding[row]], prompt)
            assert not padding[row, : len(prompt)].any()


@pytest.mark.slow
def test_generation_uses_cache_dtype():
    model = make_model("linear-grm", jnp.float32)
    low, high = (generate(model, PROMPTS, 12, cache_dtype=d) for d in ("bfloat16", None))
    weights = [first_cache(steps).stored.weights[0] for steps in (low, high)]
    assert [w.dtype for w in weights] == [jnp.bfloat16, jnp.float32]
    assert 2 * weights[0].nbytes == weights[1].nbytes
    assert np.mean([np.mean(x == y) for x, y in zip(low, high, strict=True)]) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] has shape \(0,\): must be \[t\]"),
        ({"prompts": [[1, 13]]}, r"prompts\[0\]\[1\] = 13: must be in 0..12"),
        ({"prompts": [[-1, 1]]}, r"prompts\[0\]\[0\] = -1: must be in 0..12"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] has dtype float64: must be an integer dtype"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be >= 1"),
        ({"block": 0}, "block = 0: must be >= 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be finite"),
        ({"top_k": 0}, "top_k = 0: must be >= 1"),
        ({"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p = 1.1: must be in \(0, 1\]"),
        ({"seed": -1}, "seed = -1: must be in 0..4294967295"),
        ({"rows": [0, 1]}, "rows has 2 elements: must have 1"),
        ({"rows": [2**32]}, r"rows\[0\] = 4294967296: must be in"),
    ],
)
def test_generate_rejects_invalid_arguments(options, message):
    """`generate` raises when it is called, not at the first token."""
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(make_model("linear-none", jnp.float32), **arguments)


def test_sampling_requires_rng():
    with pytest.raises(ValueError, match=r"rng = None: must be given for temperature = 1.0"):
        sample(jnp.zeros((1, 3)), temperature=1.0)
