"""Both methods of `mc_torch` match the oracle, and their gradients match each other.

PyTorch needs no compilation, so random searches and full grids are here; `test_recurrence` compares
`mc_jax` with the oracle and with gradients of `mc_torch` for fewer cases.
"""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck, gradgradcheck

from helpers.cases import (
    AGGREGATIONS,
    GATED,
    GATES,
    KINDS,
    MEMORIES,
    MODES,
    assert_close,
    make_case,
)
from helpers.covering_arrays import thinned
from helpers.recurrence_cases import (
    EDGES,
    EXACT,
    GRADIENT,
    METHODS,
    TOKEN_GATES,
    all_pairs,
    assert_matches_oracle,
    examples,
    random_cases,
)
from helpers.torch_calls import arrays, call, gradients, leaves, projected, run
from mc_core import MCConfig
from mc_torch.gates import compute_gates, dense_gates, gate_scores, level_score, scatter_gates
from mc_torch.numerics import tree_map


def check(case):
    results = [run(case, method) for method in METHODS]
    for result in results:
        assert_matches_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@pytest.mark.filterwarnings("ignore:segmentation = .logarithmic.")
@given(case=random_cases())
@settings(examples, max_examples=150)
def test_both_methods_match_oracle(case):
    """Sections 2 to 5, at lengths that are no multiple of segment or chunk size."""
    check(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:segmentation = .logarithmic.")
@given(case=random_cases())
@settings(examples, max_examples=600)
def test_both_methods_match_oracle_on_large_grid(case):
    check(case)


@pytest.mark.parametrize(
    ("memory", "mode"),
    [
        ("swla", "checkpoint"),
        ("swla", "restart"),
        ("titans", "restart"),
        ("delta", "checkpoint"),
        ("titans-last-initial", "checkpoint"),
    ],
)
@pytest.mark.parametrize("edge", EDGES)
def test_segment_edges_match_oracle(edge, memory, mode):
    check(make_case(memory, "grm", state_init_mode=mode, **EDGES[edge]))


def test_ties_go_to_the_earlier_segment():
    """Equation 16: with u = 0 every score is the same."""
    case = make_case("linear", "ssc", tokens=17, segment_size=3, ssc_top_k=2)
    case = case._replace(u=np.zeros_like(case.u))
    check(case)
    assert (run(case).gates[:, -1] > 0).sum(1).tolist() == [[2, 2, 0, 0, 0, 0, 2]] * 2


@pytest.mark.parametrize("memory", KINDS)
def test_chunked_matches_recurrent_with_zero_retention(memory):
    """Retention and momentum at and near 0: values and gradients."""
    case = make_case(memory, "residual", segment_size=11, chunk_size=11).with_zero_decay()
    check(case)
    assert_close(*(gradients(case, method) for method in METHODS), GRADIENT, name="gradient")


def check_gradients(memory, aggregation, options):
    case = make_case(memory, aggregation, **options)
    results = [gradients(case, method) for method in METHODS]
    assert_close(*results, GRADIENT, name="gradient")
    for name in ("q", "k", "v", *(["gate_bias"] if case.gate_bias is not None else [])):
        assert np.abs(results[0][name]).max() > 1e-3, f"no gradient reaches {name}"


@pytest.mark.parametrize(
    ("memory", "aggregation", "options"),
    [
        # Two aggregations of every memory are quick tests.
        pytest.param(
            *case.values,
            id=case.id,
            marks=pytest.mark.slow if (i - i // len(AGGREGATIONS)) % 3 else (),
        )
        for i, case in enumerate(all_pairs())
    ],
)
def test_chunked_gradients_match_recurrent(memory, aggregation, options):
    """Section 6: gradients of q, k, v, u, coefficients, initial, norm; also through the cache."""
    check_gradients(memory, aggregation, options)


@thinned(2, memory=KINDS, aggregation=GATED, mode=MODES)
def test_token_gates_match_oracle(memory, aggregation, mode):
    """Levels of log-linear attention: both methods, and their gradients."""
    options = TOKEN_GATES | {"state_init_mode": mode}
    check(make_case(memory, aggregation, **options))
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aggregation", GATED)
def test_token_gates_are_independent_of_keys(aggregation, method):
    """Gates have no gradient to k and do not depend on k, unlike with `gate="context"`."""
    case = make_case("linear", aggregation, tokens=9)
    for gate_ in GATES:
        gate_case = case.with_config(gate=gate_)
        inputs = arrays(gate_case)
        total = call(inputs, gate_case, method).gates.sin().sum()
        wanted = inputs["k"], inputs["u"]
        by_k, by_u = torch.autograd.grad(total, wanted, materialize_grads=True)
        other = run(gate_case._replace(k=-gate_case.k), method).gates
        depends = bool(by_k.any()), not torch.equal(run(gate_case, method).gates, other)
        assert depends == ((True, True) if gate_ == "context" else (False, False)), gate_
        assert by_u.any()


def test_detaching_stops_only_cached_gradients():
    case = make_case(
        "linear", "grm", tokens=8, segment_size=4, chunk_size=2, state_init_mode="restart"
    )
    grads = {}
    for states, context in product((False, True), repeat=2):
        detached = case.with_config(detach_cached_states=states, detach_cached_context=context)
        inputs = arrays(detached)
        last = call(inputs, detached).output[:, 4:].sin().sum()
        actual = torch.autograd.grad(last, [inputs[name] for name in "qkvu"])
        grads[states, context] = dict(zip("qkvu", (x.numpy() for x in actual), strict=True))
    first = {key: g["k"][:, :4] for key, g in grads.items()}
    assert np.abs(first[False, False]).max() > 1e-4
    assert np.abs(first[True, False]).max() > 1e-4  # through pooled keys
    assert np.abs(first[False, True]).max() > 1e-4  # through memories
    assert not first[True, True].any()
    # In restart mode, values of an earlier segment affect later reads only through its memory.
    assert not grads[True, False]["v"][:, :4].any()
    assert_close(grads[False, True]["v"], grads[False, False]["v"], GRADIENT)
    for name in "qu":
        assert_close(grads[True, True][name], grads[False, False][name], GRADIENT, name=name)
    later = [g["v"][:, 4:] for g in grads.values()]
    for other in later[1:]:
        assert_close(other, later[0], GRADIENT, name="v of the online segment")


@pytest.mark.parametrize(
    ("memory", "aggregation"),
    [("linear", "grm"), ("linear", "residual"), ("dla", "soup")],
)
def test_detached_gradients_match_between_methods(memory, aggregation):
    case = make_case(memory, aggregation, tokens=9)
    plain = gradients(case)
    case = case.with_config(detach_cached_states=True, detach_cached_context=True)
    chunked, recurrent = (output_gradient(case, method) for method in METHODS)
    assert_close(chunked, recurrent, GRADIENT)
    assert np.abs(chunked[0] - plain["k"]).max() > 1e-4


def output_gradient(case, method):
    inputs = arrays(case)
    loss = call(inputs, case, method).output.sin().sum()
    return [x.numpy() for x in torch.autograd.grad(loss, [inputs[name] for name in "kqv"])]


# Every memory and every aggregation once; all pairs are slow tests.
DERIVATIVES = (
    ("linear-normalized", "grm", "checkpoint"),
    ("swla", "ssc", "restart"),
    ("dla", "soup", "checkpoint"),
    ("titans-norm", "grm", "restart"),
    ("titans-flat", "residual", "checkpoint"),
)


def check_derivatives(memory, aggregation, mode, order):
    """Check finite differences of all inputs along a random direction."""
    case = make_case(
        memory, aggregation, tokens=5, batch=1, heads=1, segment_size=2, state_init_mode=mode
    )
    inputs = arrays(case)
    tensors = leaves(inputs)

    def function(*tensors):
        rest = iter(tensors)
        return projected(call({k: _filled(x, rest) for k, x in inputs.items()}, case))

    (gradcheck if order == 1 else gradgradcheck)(function, tensors, fast_mode=True)


def _filled(tree, tensors):
    return tree_map(lambda _: next(tensors), tree)


SLOW_SECOND = ("titans-norm", "dla", "linear-normalized")


@pytest.mark.parametrize(
    ("order", "memory", "aggregation", "mode"),
    [
        pytest.param(
            order, *row, marks=pytest.mark.slow if order == 2 and row[0] in SLOW_SECOND else ()
        )
        for order in (1, 2)
        for row in DERIVATIVES
    ],
)
def test_gradients_match_finite_differences(memory, aggregation, mode, order):
    check_derivatives(memory, aggregation, mode, order)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation"), list(product(MEMORIES, AGGREGATIONS)))
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_match_finite_differences_for_all_pairs(memory, aggregation, order):
    check_derivatives(memory, aggregation, "checkpoint", order)


@pytest.mark.parametrize("width", [1, 2, 5, 12])
def test_level_is_bit_length_of_age(width):
    u, age = torch.arange(width), torch.arange(-3, 2000)
    expected = [min(max(x, 0).bit_length(), width - 1) for x in age.tolist()]
    assert level_score(u, age).tolist() == expected


@pytest.mark.parametrize("gated_by", GATES)
@pytest.mark.parametrize("block", [512, 3])
def test_gates_of_selected_memories_match_dense_gates(block, gated_by, monkeypatch):
    """Sparse gates match `dense_gates`, for one and for several blocks of tokens."""
    monkeypatch.setattr("mc_torch.gates.SCORE_BLOCK", block)
    rng = np.random.default_rng(0)
    u, running = torch.from_numpy(rng.standard_normal((2, 2, 7, 3, 4)))
    pools = torch.from_numpy(rng.standard_normal((2, 5, 3, 4)))
    segment = torch.tensor([0, 1, 2, 3, 4, 4, 2])
    config = MCConfig(8, 2, aggregation="ssc", ssc_top_k=2, gate=gated_by)
    bias = torch.from_numpy(rng.standard_normal(3))
    weights, selected = compute_gates(u, pools, running, segment, config, bias)
    assert weights.shape == (2, 7, 3, 3)
    score = gate_scores(u, pools, running, segment, config, bias)
    expected = dense_gates(score, segment, config)
    torch.testing.assert_close(scatter_gates(weights, selected, 5), expected)
