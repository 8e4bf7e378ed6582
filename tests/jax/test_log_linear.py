"""Log-linear attention in JAX: three forms and streams against a NumPy oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import oracle_log_linear as oracle
from helpers.cases import assert_close
from helpers.oracle_log_linear import LogLinearCase, make_log_linear_case
from mc_jax import log_linear, log_linear_attention
from mc_jax.log_linear import LevelTokens, extend_levels, final_state, prepare_tokens

EXACT, GRADIENT = 1e-10, 1e-9
NAMES = ("q", "k", "v", "level_weights", "retention")
DENSE, RECURRENT = {"method": "dense"}, {"method": "recurrent"}

exact = pytest.mark.usefixtures("float64", "strict")


def arrays(case: LogLinearCase) -> list[jax.Array]:
    return [jnp.asarray(x) for x in case.inputs]


def mask_of(case: LogLinearCase) -> jax.Array | None:
    return None if case.mask is None else jnp.asarray(case.mask)


def run(case: LogLinearCase, forms: list[dict]) -> list:
    """Return the output and the gradients of several forms, in one program."""

    @jax.jit
    def program(inputs, mask, cotangent):
        results = []
        for form in forms:
            y, pull = jax.vjp(partial(log_linear_attention, mask=mask, **form), *inputs)
            results.append((y, pull(cotangent)))
        return results

    return program(arrays(case), mask_of(case), jnp.asarray(case.cotangent))


SIZES = {
    1: [1, 64],
    9: [1, 4],
    37: [8],
    2: [1, 2],
    3: [2],
    7: [4],
    8: [2, 8],
    64: [1, 16],
    65: [4, 64],
}


@exact
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        pytest.param(tokens, mask, marks=() if (tokens, mask) in quick else pytest.mark.slow)
        for quick in [{(1, False), (9, True), (37, True)}]
        for tokens in SIZES
        for mask in (False, True)
    ],
)
def test_forms_match_oracle(tokens, mask):
    """Outputs and gradients of the three forms."""
    case = make_log_linear_case(tokens, mask, extra_levels=1)
    output, gradients = oracle.output(case), oracle.gradients(case)
    forms = [DENSE, RECURRENT, *({"chunk_size": size} for size in SIZES[tokens])]
    for form, (y, grads) in zip(forms, run(case, forms), strict=True):
        assert_close(y, output, EXACT, name=f"{form} output")
        for name, actual, wanted in zip(NAMES, grads, gradients, strict=True):
            assert_close(actual, wanted, GRADIENT, name=f"{form} {name}")


@exact
@pytest.mark.parametrize("tokens", [33, pytest.param(64, marks=pytest.mark.slow)])
def test_blocks_of_long_sequences_match_oracle(tokens, monkeypatch):
    """Outputs and gradients, with an incomplete last block and with complete blocks."""
    monkeypatch.setattr(log_linear, "_BLOCK", 8)
    case = make_log_linear_case(tokens, mask=True)
    ((y, grads),) = run(case, [{"chunk_size": 2}])
    assert_close(y, oracle.output(case), EXACT)
    for name, actual, wanted in zip(NAMES, grads, oracle.gradients(case), strict=True):
        assert_close(actual, wanted, GRADIENT, name=name)


@exact
def test_nan_at_masked_tokens_is_ignored():
    case = make_log_linear_case(9, mask=True)
    poisoned = [
        np.where(case.mask.reshape(2, 9, *[1] * (x.ndim - 2)), x, np.nan) for x in case.inputs
    ]
    nans = case._replace(**dict(zip(NAMES, poisoned, strict=True)))
    output, gradients = oracle.output(case), oracle.gradients(case)
    for y, grads in run(nans, [DENSE, RECURRENT, {"chunk_size": 2}]):
        assert_close(y, output, EXACT)
        assert_close(grads, gradients, GRADIENT)
        assert not np.asarray(y)[~case.mask].any()


@exact
def test_split_stream_matches_oracle():
    """Outputs, states and gradients; calls of one and of several chunks."""
    case = make_log_linear_case(13, mask=True)

    @jax.jit
    def program(inputs, mask, cotangent):
        def outputs(*inputs):
            state, position, parts = jnp.zeros((2, 2, 5, 3, 4)), jnp.zeros(2, jnp.int32), []
            for first, last in ((0, 5), (5, 6), (6, 13)):
                here = slice(first, last)
                tokens = LevelTokens(*(x[:, here] for x in inputs))
                tokens = prepare_tokens(tokens, mask[:, here])
                count = jnp.full_like(position, last - first)
                y, state = extend_levels(tokens, state, position, count, chunk_size=4)
                parts.append(y.swapaxes(1, 2))
                position = position + count
            y = jnp.concatenate(parts, axis=1)
            return jnp.where(mask[..., None, None], y, 0), state

        y, pull, state = jax.vjp(outputs, *inputs, has_aux=True)
        whole = final_state(prepare_tokens(LevelTokens(*inputs), mask))
        return y, pull(cotangent), state, whole

    y, grads, *states = program(arrays(case), mask_of(case), jnp.asarray(case.cotangent))
    assert_close(y, oracle.output(case), EXACT)
    assert_close(grads, oracle.gradients(case), GRADIENT)
    for state in states:
        assert_close(state, oracle.states(case), EXACT)


@pytest.mark.slow
def test_bfloat16_states_are_float32():
    """Products have bfloat16 operands; sums over tokens and decay are float32."""
    case = make_log_linear_case(512)
    retention = jnp.full(case.retention.shape, 0.9995, jnp.float32)
    given = [jnp.ones(x.shape, jnp.bfloat16) for x in case.inputs[:3]]
    weights = jnp.ones(case.level_weights.shape, jnp.float32)
    total = np.cumsum(0.9995 ** np.arange(512)) * 4
    for form in ({"chunk_size": 64}, RECURRENT):
        y = jax.jit(partial(log_linear_attention, **form))(*given, weights, retention)
        assert y.dtype == jnp.bfloat16
        assert_close(y.astype(jnp.float32)[0, :, 0, 0], total, 4e-3, name=f"{form}")
    for decay, tolerance in ((1.0, 0.0), (0.9995, 1e-3)):
        tokens = LevelTokens(*given, weights, jnp.full_like(retention, decay))
        state = final_state(prepare_tokens(tokens, None))
        assert state.dtype == jnp.float32
        last = sum(decay**i for i in range(256, 512))
        assert_close(state[:, :, 9], np.full((2, 2, 3, 4), last), tolerance)


def test_no_array_has_tokens_times_levels_times_state():
    """The backward pass stores at most one state per node of the tree, and vectors per level."""
    tokens, width, chunk = 1024, 16, 16
    shape = (1, tokens, 1)
    x = jax.ShapeDtypeStruct((*shape, width), jnp.float32)
    weights, retention = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, 11), shape))

    def step(*inputs):
        return jax.vjp(partial(log_linear_attention, chunk_size=chunk), *inputs)[1](inputs[2])

    text = jax.jit(step).lower(x, x, x, weights, retention).as_text()
    sizes = [
        np.prod([int(n) for n in dims.split("x")[:-1]])
        for dims in {part.split(">")[0] for part in text.split("tensor<")[1:]}
        if "x" in dims
    ]
    assert max(sizes) <= tokens * max(2 * width, chunk + 1)


def test_invalid_arguments_are_rejected():
    given = [jnp.asarray(x, jnp.float32) for x in make_log_linear_case(5).inputs]
    for arguments, options, message in (
        (given, {"method": "fast"}, "method = 'fast': must be one of 'chunked', 'recurrent', 'd"),
        (given, {"chunk_size": 6}, "chunk_size = 6: must be a power of two"),
        ([*given[:3], given[3][..., :3], given[4]], {}, "has 3 levels: 5 tokens need >= 4"),
        (given, {"mask": jnp.ones((2, 4), bool)}, r"mask has shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            log_linear_attention(*arguments, **options)
