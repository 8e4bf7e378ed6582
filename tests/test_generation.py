"""Generation: greedy is the argmax of full passes; sampling draws from what its options name."""

from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_core.generation import bucket, make_blocks
from mc_jax import LanguageModel, generate, sample
from mc_jax.generation import _make_programs

VOCAB = 13
DLA, TITANS = DLAConfig(depth=2, expansion=2), TitansConfig(depth=2, expansion=2)
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
    """Build a model that does not just repeat its last token, as one with tied embeddings may."""
    layer = MCConfig.from_dict(LAYERS[name].to_dict() | {"segment_size": 4, "chunk_size": 3})
    config = ModelConfig(VOCAB, num_layers=layers, layer=layer, ffn_width=16, tie_embeddings=False)
    return LanguageModel(config, rngs=nnx.Rngs(2), param_dtype=dtype)


def tokens_of(model: LanguageModel, prompts: Any, count: int, **options: Any) -> np.ndarray:
    """Return what `generate` gives, [b, count]."""
    steps = list(generate(model, prompts, count, **options))
    assert all(step.shape == (len(prompts),) and step.dtype == jnp.int32 for step in steps)
    return np.stack(steps, axis=1)


def keys_of(seed: int, rows: Any, step: int) -> jax.Array:
    """Return what the draws of a step depend on, by their definition."""
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), r), step) for r in rows]
    return jnp.stack(keys)


def first_cache(steps: Any) -> Any:
    """Return the cache of the first block, of an iterator that has not begun."""
    return steps.gi_frame.f_locals["cache"][0]


def by_full_passes(
    model: LanguageModel, prompt: list[int], row: int, count: int, seed: int = 0, **options: Any
) -> list[int]:
    """Choose a token after a full pass over all tokens so far, again and again."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    tokens = np.zeros((1, max(map(len, PROMPTS)) + count), np.int32)  # one length, one program
    tokens[0, : len(prompt)] = prompt
    for step in range(count):
        at = len(prompt) + step
        logits = run(state, tokens)[:, at - 1]
        (tokens[0, at],) = sample(logits, keys_of(seed, [row], step), **options)
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_are_those_of_repeated_full_passes(name):
    """Token for token, greedy and sampled, for rows of different lengths, over many segments."""
    model = make_model(name)
    for options in ({}, SAMPLED):
        found = tokens_of(model, PROMPTS, 14, block=4, **options)
        for row, prompt in enumerate(PROMPTS):
            assert found[row].tolist() == by_full_passes(model, prompt, row, 14, **options)
    assert len(np.unique(found)) > 6


@pytest.mark.usefixtures("float64", "strict")
def test_a_row_gives_what_it_gives_alone():
    model = make_model(layers=2)
    for options in ({"block": 1}, SAMPLED | {"block": 1}):
        together = tokens_of(model, PROMPTS, 14, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = tokens_of(model, [prompt], 14, rows=[row], **options)
            np.testing.assert_array_equal(together[row], alone[0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("left", [True, False])
def test_left_and_right_padded_prompts_give_what_each_row_gives_alone(left):
    """A batch that is padded by hand on either side, through `extend`, goes on as `generate`."""
    model = make_model()
    graph, state = nnx.split(model)
    extend = jax.jit(lambda s, *args, padding: nnx.merge(graph, s).extend(*args, padding=padding))
    width = max(map(len, PROMPTS))
    tokens, padding = np.full((3, width), 4, np.int32), np.ones((3, width), bool)
    for row, prompt in enumerate(PROMPTS):
        start = (width - len(prompt)) * left
        place = slice(start, start + len(prompt))
        tokens[row, place], padding[row, place] = prompt, False
    logits, filled = extend(state, tokens, model.init_cache(3, 32), padding=padding)
    last = [width - 1] * 3 if left else [len(prompt) - 1 for prompt in PROMPTS]
    for seed, options in ((0, {}), (5, {"temperature": 2.0})):
        expected = tokens_of(model, PROMPTS, 6, seed=seed, **options)
        after, cache = logits[np.arange(3), np.array(last)], filled
        for step in range(6):
            new = sample(after, keys_of(seed, range(3), step), **options)
            np.testing.assert_array_equal(new, expected[:, step])
            after, cache = extend(state, new[:, None], cache, padding=np.zeros((3, 1), bool))
            after = after[:, 0]


@pytest.mark.usefixtures("float64")
def test_the_width_of_blocks_changes_nothing():
    model = make_model("linear-soup")
    whole = tokens_of(model, PROMPTS, 10, **SAMPLED)
    for block in (1, 3):
        np.testing.assert_array_equal(tokens_of(model, PROMPTS, 10, block=block, **SAMPLED), whole)


def distribution(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """Return the probabilities that the options name, one id after another."""
    shares = np.exp((logits - logits.max()) / temperature)
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    shares /= shares[ids].sum()
    kept, total = [], 0.0
    for i in ids:
        if total >= (top_p or 1.0):
            break
        kept.append(i)
        total += shares[i]
    out = np.zeros(len(logits))
    out[kept] = shares[kept] / shares[kept].sum()
    return out


SAMPLING = [
    (1.0, None, None),
    (0.5, None, None),
    (2.0, 3, None),
    (1.0, None, 0.6),
    (0.7, 4, 0.8),
    (3.0, 100, 1.0),
    (1.0, 3, 0.99),
    (1.0, None, 1e-9),
]
LOGITS = np.array([0.3, 1.9, -1.0, 1.9, 0.3, 2.5, -4.0])  # with equal ones at the cuts


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SAMPLING)
def test_sampling_draws_from_the_distribution(temperature, top_k, top_p):
    draws = 40_000
    rng = jax.random.split(jax.random.key(1), draws)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, 7))
    found = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
    check_frequencies(np.asarray(found), distribution(LOGITS, temperature, top_k, top_p))


def check_frequencies(found: np.ndarray, expected: np.ndarray) -> None:
    """Hold draws to probabilities: none where they are 0, elsewhere within 4.5 deviations."""
    shares = np.bincount(found, minlength=len(expected)) / len(found)
    assert (shares[expected == 0] == 0).all(), (shares, expected)
    limit = 4.5 * np.sqrt(expected * (1 - expected) / len(found))
    assert (np.abs(shares - expected) <= limit + 1e-12).all(), (shares, expected)


def test_greedy_takes_the_first_of_equal_logits_and_flags_what_is_not_finite():
    bad = LOGITS.copy()
    bad[0] = np.nan
    logits = np.stack([LOGITS, np.zeros(7), bad, np.full(7, np.inf)]).astype(np.float32)
    assert sample(jnp.asarray(logits)).tolist() == [5, 0, -1, -1]
    rng = jax.random.split(jax.random.key(0), 4)
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        tokens = sample(jnp.asarray(logits), rng, temperature=9.0, **options)
        assert tokens.tolist() == [5, 0, -1, -1]


def test_a_seed_is_a_text():
    """The same seed draws the same; another seed, and another row, draws something else."""
    model, options = make_model("linear-none", jnp.float32), {"temperature": 2.0}
    prompts = [PROMPTS[0]] * 2
    first = tokens_of(model, prompts, 20, seed=7, **options)
    np.testing.assert_array_equal(first, tokens_of(model, prompts, 20, seed=7, **options))
    assert (first != tokens_of(model, prompts, 20, seed=8, **options)).any(axis=1).all()
    assert (first[0] != first[1]).any()
    swapped = tokens_of(model, prompts, 20, seed=7, rows=[1, 0], **options)
    np.testing.assert_array_equal(first, swapped[::-1])


@pytest.mark.parametrize("restored", [False, True])
def test_few_programs_serve_all_lengths(restored, caplog):
    """17 to 32 tokens are one shape; stopping early adds none, nor do parameters of a checkpoint.

    Those are bound to a device, so that all that is computed with them is, too.
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
            assert caplog.text.count("Compiling jit(extend)") == used, "compiled on the way"
        assert used == programs
    assert [bucket(n, 8) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]


def test_a_restored_models_cached_memories_may_lie_in_the_hosts_memory(caplog):
    """They stay there, the tokens are the same, and nothing is compiled on the way."""
    model = make_model("linear-grm", jnp.float32)
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    near = tokens_of(model, PROMPTS, 9, block=1)
    steps = generate(model, PROMPTS, 9, block=1, cache_device="host")
    weights = first_cache(steps).stored.weights
    assert {w.sharding.memory_kind for w in weights} == {"pinned_host"}
    with jax.log_compiles():
        np.testing.assert_array_equal(np.stack(list(steps), axis=1), near)
    assert "Compiling jit(extend)" not in caplog.text


def test_blocks_hold_every_prompt_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        prompts = [rng.integers(0, 99, n) for n in rng.integers(1, 40, 3)]
        blocks = make_blocks(prompts, 8)
        assert {block.tokens.shape[1] for block in blocks[:-1]} <= {8}
        tokens, padding = (np.concatenate(x, axis=1) for x in zip(*blocks, strict=True))
        for row, prompt in enumerate(prompts):
            np.testing.assert_array_equal(tokens[row][~padding[row]], prompt)
            assert not padding[row, : len(prompt)].any()


def test_cached_memories_are_kept_in_the_dtype_that_is_asked_for():
    model = make_model("linear-grm", jnp.float32)
    low, high = (generate(model, PROMPTS, 12, cache_dtype=d) for d in ("bfloat16", None))
    weights = [first_cache(steps).stored.weights[0] for steps in (low, high)]
    assert [w.dtype for w in weights] == [jnp.bfloat16, jnp.float32]
    assert 2 * weights[0].nbytes == weights[1].nbytes
    assert np.mean([np.mean(x == y) for x, y in zip(low, high, strict=True)]) > 0.5


def test_cached_memories_on_the_host_give_the_same():
    model = make_model("linear-grm", jnp.float32)
    near, far = (tokens_of(model, PROMPTS, 12, cache_device=d) for d in ("device", "host"))
    np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] has shape \(0,\): must be \[t\]"),
        ({"prompts": [[1, 13]]}, r"prompts\[0\]\[1\] = 13: must be in 0..12"),
        ({"prompts": [[-1, 1]]}, r"prompts\[0\]\[0\] = -1: must be in 0..12"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] has dtype float64: must be integers"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be >= 1"),
        ({"block": 0}, "block = 0: must be >= 1"),
        ({"temperature": -0.1}, "temperature = -0.1: must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature = nan: must be finite"),
        ({"top_k": 0}, "top_k = 0: must be >= 1"),
        ({"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p = 1.1: must be in \(0, 1\]"),
        ({"seed": -1}, "seed = -1: must be in 0..4294967295"),
        ({"rows": [0, 1]}, "rows: 2 numbers for 1 prompts"),
        ({"rows": [2**32]}, r"rows\[0\] = 4294967296: must be in"),
    ],
)
def test_bad_arguments(options, message):
    """Refused when `generate` is called, not when the first token is asked for."""
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        generate(make_model("linear-none", jnp.float32), **arguments)


def test_sampling_needs_a_random_stream():
    with pytest.raises(ValueError, match=r"rng = None: must be given where temperature = 1.0"):
        sample(jnp.zeros((1, 3)), temperature=1.0)
