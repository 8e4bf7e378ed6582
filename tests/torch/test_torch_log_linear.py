"""Log-linear attention in PyTorch: three forms and streams against a NumPy oracle."""

import functools

import numpy as np
import pytest
import torch

from helpers import oracle_log_linear as oracle
from helpers.cases import assert_close
from helpers.oracle_log_linear import LogLinearCase, make_log_linear_case
from mc_torch import log_linear_attention
from mc_torch.log_linear import LevelTokens, extend_levels, final_state, prepare_tokens

torch.set_num_threads(1)  # tiny tensors: threads would not help

EXACT, GRADIENT = 1e-10, 1e-9
LENGTHS = (1, 2, 3, 7, 8, 9, 16, 37)
LONG = (64, 65, 100)
NAMES = ("q", "k", "v", "level_weights", "retention")
FORMS = (
    {"method": "dense"},
    {"method": "recurrent"},
    *({"chunk_size": size} for size in (1, 2, 4, 16, 64)),
)


def tensors(case: LogLinearCase, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=dtype, requires_grad=True) for x in case.inputs]


def mask_of(case: LogLinearCase) -> torch.Tensor | None:
    return None if case.mask is None else torch.tensor(case.mask)


def run(case: LogLinearCase, **form):
    """Return the output and the gradients."""
    given = tensors(case)
    y = log_linear_attention(*given, mask=mask_of(case), **form)
    grads = torch.autograd.grad((y * torch.tensor(case.cotangent)).sum(), given)
    return y.detach().numpy(), [x.numpy() for x in grads]


@functools.cache
def expected(tokens: int, mask: bool):
    case = make_log_linear_case(tokens, mask, extra_levels=1)
    return case, oracle.output(case), oracle.gradients(case)


@pytest.mark.parametrize("mask", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize(
    "tokens", [*LENGTHS, *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)]
)
def test_forms_match_oracle(tokens, mask):
    """Outputs and gradients of the three forms, with chunks of several sizes."""
    case, output, gradients = expected(tokens, mask)
    for form in FORMS:
        y, grads = run(case, **form)
        assert_close(y, output, EXACT, name=f"{form} output")
        for name, actual, wanted in zip(NAMES, grads, gradients, strict=True):
            assert_close(actual, wanted, GRADIENT, name=f"{form} {name}")


@pytest.mark.parametrize("tokens", LONG)
def test_forms_match_each_other_over_several_tree_levels(tokens):
    case = make_log_linear_case(tokens, mask=True)
    output, gradients = run(case, method="dense")
    for size in (1, 4, 16):
        y, grads = run(case, chunk_size=size)
        assert_close(y, output, EXACT, name=f"{size} output")
        assert_close(grads, gradients, GRADIENT, name=f"{size}")


@pytest.mark.parametrize("mask", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_final_state_matches_recurrent_form(tokens, mask):
    case = make_log_linear_case(tokens, mask)
    state = final_state(prepare_tokens(LevelTokens(*tensors(case)), mask_of(case)))
    assert_close(state.detach().numpy(), oracle.states(case), EXACT)


def stream(case: LogLinearCase, given: list, splits: tuple[int, ...], chunk_size: int, levels: int):
    """Return the outputs [b, t, h, v] and the final states of a stream."""
    batch, _, heads, width = case.q.shape
    state = torch.zeros(batch, heads, levels, case.v.shape[-1], width, dtype=torch.float64)
    position, outputs, first = torch.zeros(batch, dtype=torch.int32), [], 0
    for number in splits:
        here = slice(first, first + number)
        mask = None if case.mask is None else torch.tensor(case.mask[:, here])
        tokens = prepare_tokens(LevelTokens(*(x[:, here] for x in given)), mask)
        count = torch.full_like(position, number)
        y, state = extend_levels(tokens, state, position, count, chunk_size=chunk_size)
        y = y.transpose(1, 2)
        outputs.append(y if mask is None else torch.where(mask[..., None, None], y, 0.0))
        position, first = position + number, first + number
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("splits", [(37,), (1,) * 37, (5, 1, 1, 20, 10), (16, 16, 5), (3, 34)])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_split_stream_matches_oracle(splits, chunk_size):
    """Outputs, states and gradients do not depend on the split."""
    case, output, gradients = expected(37, True)
    given = tensors(case)
    y, state = stream(case, given, splits, chunk_size, case.level_weights.shape[-1])
    assert_close(y.detach().numpy(), output, EXACT)
    assert_close(state.detach().numpy(), oracle.states(case), EXACT)
    grads = torch.autograd.grad((y * torch.tensor(case.cotangent)).sum(), given)
    for name, actual, wanted in zip(NAMES, grads, gradients, strict=True):
        assert_close(actual.numpy(), wanted, GRADIENT, name=name)


def test_stream_rows_have_their_own_positions():
    """Rows with different numbers of tokens per call; the rest of a call is padding."""
    case, output, _ = expected(37, False)
    counts = np.array([[5, 0, 1, 20, 11], [0, 17, 3, 1, 16]])
    state, position = torch.zeros(2, 2, 8, 3, 4, dtype=torch.float64), torch.zeros(2).int()
    for count in counts.T:
        index = position.numpy()[:, None] + np.arange(count.max())
        valid = np.arange(count.max()) < count[:, None]
        parts = (x[[[0], [1]], np.minimum(index, 36)] for x in case.inputs)
        tokens = LevelTokens(
            *(
                torch.tensor(np.where(valid.reshape(*valid.shape, *[1] * (x.ndim - 2)), x, np.nan))
                for x in parts
            )
        )
        tokens = prepare_tokens(tokens, torch.tensor(valid))
        y, state = extend_levels(tokens, state, position, torch.tensor(count).int(), chunk_size=4)
        for row, number in enumerate(count):
            start = int(position[row])
            assert_close(
                y.transpose(1, 2)[row, :number].numpy(), output[row, start : start + number], EXACT
            )
        position = position + torch.tensor(count).int()
    assert_close(state.numpy(), oracle.states(case), EXACT)


def test_unit_level_weights_are_linear_attention():
    case = make_log_linear_case(37)
    case = case._replace(
        level_weights=np.ones_like(case.level_weights), retention=np.ones_like(case.retention)
    )
    scores = np.tril(np.einsum("bthk,bshk->bhts", case.q, case.k))
    y = np.einsum("bhts,bshv->bthv", scores, case.v)
    for form in FORMS:
        assert_close(run(case, **form)[0], y, EXACT, name=f"{form}")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_outputs_are_causal(form):
    case = make_log_linear_case(37)
    noise = np.random.default_rng(9)
    later = [
        np.where(
            np.arange(37).reshape(1, -1, *[1] * (x.ndim - 2)) >= 21,
            noise.uniform(0.6, 1, x.shape),
            x,
        )
        for x in case.inputs
    ]
    changed = case._replace(**dict(zip(NAMES, later, strict=True)))
    before, after = run(case, **form)[0], run(changed, **form)[0]
    np.testing.assert_array_equal(before[:, :21], after[:, :21])
    assert np.abs(before - after)[:, 21:].max(axis=(0, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nan_at_masked_tokens_is_ignored(form):
    case, output, gradients = expected(37, True)
    poisoned = [
        np.where(case.mask.reshape(2, 37, *[1] * (x.ndim - 2)), x, np.nan) for x in case.inputs
    ]
    y, grads = run(case._replace(**dict(zip(NAMES, poisoned, strict=True))), **form)
    assert_close(y, output, EXACT)
    assert not y[~case.mask].any()
    for name, actual, wanted in zip(NAMES, grads, gradients, strict=True):
        assert_close(actual, wanted, GRADIENT, name=name)
        assert not actual[~case.mask].any()


def test_small_retention_is_precise():
    """A retention near 0 decays the past without rounding errors at later tokens."""
    case = make_log_linear_case(37)
    case = case._replace(retention=np.where(np.arange(37)[:, None] % 5 == 2, 1e-12, case.retention))
    output, gradients = oracle.output(case), oracle.gradients(case)
    for form in FORMS:
        y, grads = run(case, **form)
        assert_close(y, output, EXACT, name=f"{form}")
        assert_close(grads[:4], gradients[:4], GRADIENT, name=f"{form}")


def test_bfloat16_states_are_float32():
    """Products have bfloat16 operands; sums over tokens and decay are float32."""
    case = make_log_linear_case(512)
    ones = [np.ones_like(x) for x in case.inputs[:3]]
    retention = np.full_like(case.retention, 0.9995)
    given = [torch.tensor(x, dtype=torch.bfloat16) for x in ones]
    weights = torch.ones(case.level_weights.shape)
    total = np.cumsum(0.9995 ** np.arange(512)) * 4
    for form in ({"chunk_size": 64}, {"method": "recurrent"}, {"method": "dense"}):
        y = log_linear_attention(*given, weights, torch.tensor(retention).float(), **form)
        assert y.dtype == torch.bfloat16
        assert_close(y.float().numpy()[0, :, 0, 0], total, 4e-3, name=f"{form}")
    for decay, tolerance in ((1.0, 0.0), (0.9995, 1e-3)):
        tokens = LevelTokens(*given, weights, torch.full(retention.shape, decay))
        state = final_state(prepare_tokens(tokens, None))
        assert state.dtype == torch.float32
        last = sum(decay**i for i in range(256, 512))
        assert_close(state[:, :, 9].numpy(), np.full((2, 2, 3, 4), last), tolerance)


def test_invalid_arguments_are_rejected():
    given = tensors(make_log_linear_case(5))
    weights = given[3]
    for arguments, options, message in (
        (given, {"method": "fast"}, "method = 'fast': must be one of 'chunked', 'recurrent', 'd"),
        (given, {"chunk_size": 6}, "chunk_size = 6: must be a power of two"),
        (given, {"chunk_size": 0}, "chunk_size = 0: must be a power of two"),
        (
            [*given[:3], weights[..., :3], given[4]],
            {},
            "level_weights has 3 levels: 5 tokens need >= 4",
        ),
        (
            [*given[:4], given[4][:, :4]],
            {},
            r"retention has shape \(2, 4, 2\): must be \(2, 5, 2\)",
        ),
        (given, {"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\)"),
        ([x[:, :0] for x in given], {}, "must have t >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            log_linear_attention(*arguments, **options)
