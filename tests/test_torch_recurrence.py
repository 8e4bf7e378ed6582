"""`mc_torch`: both methods against the oracle, and against each other in their gradients.

The cases are those of `test_recurrence`, which holds `mc_jax` to the same.
"""

from itertools import product

import numpy as np
import pytest
import torch
from cases import AGGREGATIONS, GATED, GATES, MAIN, MEMORIES, MODES, assert_close, make_case
from hypothesis import given, settings
from test_recurrence import (
    EXACT,
    GRADIENT,
    METHODS,
    QUICK,
    TOKEN_GATES,
    examples,
    hold_to_oracle,
    paired,
    random_cases,
)
from torch.autograd import gradcheck, gradgradcheck
from torch_subject import arrays, call, gradients, leaves, projected, run

from mc_core import MCConfig
from mc_torch.gates import at_level, gate, gate_densely, scores, spread
from mc_torch.numerics import tree_map


def check(case):
    results = [run(case, method) for method in METHODS]
    for result in results:
        hold_to_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@given(case=random_cases())
@settings(examples, max_examples=60)
def test_both_methods_are_the_oracle(case):
    """Sections 2 to 5, at lengths that divide nothing."""
    check(case)


@pytest.mark.slow
@given(case=random_cases())
@settings(examples, max_examples=600)
def test_both_methods_are_the_oracle_on_a_large_grid(case):
    check(case)


@pytest.mark.parametrize(("memory", "mode"), [("swla", "checkpoint"), ("titans", "restart")])
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1},
        {"tokens": 5, "segment_size": 9, "chunk_size": 20},
        {"tokens": 7, "segment_size": 1},
        {"tokens": 11, "lengths": (7, 1, 1, 1, 1), "chunk_size": 2},
        {"tokens": 9, "mask": "segment", "segment_size": 3, "chunk_size": 2},
    ],
    ids=["one-token", "one-short-segment", "segments-of-one", "uneven", "masked-segment"],
)
def test_edges_of_segments(memory, mode, options):
    check(make_case(memory, "grm", state_init_mode=mode, **options))


def test_ties_go_to_the_earlier_segment():
    """Equation 16: with u = 0 every score is the same."""
    case = make_case("linear", "ssc", tokens=17, segment_size=3, ssc_top_k=2)
    case = case._replace(u=np.zeros_like(case.u))
    check(case)
    assert (run(case).gates[:, -1] > 0).sum(1).tolist() == [[2, 2, 0, 0, 0, 0, 2]] * 2


@pytest.mark.parametrize("memory", MAIN)
def test_a_past_that_is_let_go(memory):
    """Retention and momentum of 0 and next to it: values, and gradients by them, too."""
    case = make_case(memory, "residual", segment_size=11, chunk_size=11).closing()
    check(case)
    assert_close(*(gradients(case, method) for method in METHODS), GRADIENT, name="gradient")


def check_gradients(memory, aggregation, options):
    case = make_case(memory, aggregation, **options)
    results = [gradients(case, method) for method in METHODS]
    assert_close(*results, GRADIENT, name="gradient")
    for name in "qkv":
        assert np.abs(results[0][name]).max() > 1e-3, f"no gradient reaches {name}"


@pytest.mark.parametrize(("memory", "aggregation", "options"), paired(QUICK))
def test_gradients_of_the_chunked_form_are_those_of_the_recurrence(memory, aggregation, options):
    """Section 6: q, k, v, u, coefficients, initial, norm; cotangents on the cache, too."""
    check_gradients(memory, aggregation, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "aggregation", "options"), paired(product(MEMORIES, AGGREGATIONS))
)
def test_gradients_of_all_pairs(memory, aggregation, options):
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize(("memory", "aggregation", "mode"), list(product(MAIN, GATED, MODES)))
def test_gates_of_the_token_alone(memory, aggregation, mode):
    """The levels of log-linear attention: both methods, and their gradients."""
    options = TOKEN_GATES | {"state_init_mode": mode}
    check(make_case(memory, aggregation, **options))
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aggregation", GATED)
def test_gates_of_the_token_alone_see_no_key(aggregation, method):
    """No gradient of theirs reaches k, and other keys leave them as they are; not so `context`."""
    case = make_case("linear", aggregation, tokens=9)
    for gate_ in GATES:
        own = case.where(gate=gate_)
        inputs = arrays(own)
        total = call(inputs, own, method).gates.sin().sum()
        wanted = inputs["k"], inputs["u"]
        by_k, by_u = torch.autograd.grad(total, wanted, materialize_grads=True)
        other = run(own._replace(k=-own.k), method).gates
        seen = bool(by_k.any()), not torch.equal(run(own, method).gates, other)
        assert seen == ((True, True) if gate_ == "context" else (False, False)), gate_
        assert by_u.any()


@pytest.mark.parametrize(
    ("memory", "aggregation"),
    [("linear", "grm"), ("linear", "residual"), ("dla", "soup")],
)
def test_both_methods_detach_alike(memory, aggregation):
    case = make_case(memory, aggregation, tokens=9)
    plain = gradients(case)
    case = case.where(detach_cached_states=True, detach_cached_context=True)
    chunked, recurrent = (output_gradient(case, method) for method in METHODS)
    assert_close(chunked, recurrent, GRADIENT)
    assert np.abs(chunked[0] - plain["k"]).max() > 1e-4


def output_gradient(case, method):
    inputs = arrays(case)
    loss = call(inputs, case, method).output.sin().sum()
    return [x.numpy() for x in torch.autograd.grad(loss, [inputs[name] for name in "kqv"])]


# Every memory and every aggregation once; all pairs are among the slow ones.
DERIVATIVES = (
    ("linear-normalized", "grm", "checkpoint"),
    ("swla", "ssc", "restart"),
    ("dla", "soup", "checkpoint"),
    ("titans-norm", "grm", "restart"),
    ("titans-flat", "residual", "checkpoint"),
)


def check_derivatives(memory, aggregation, mode, order):
    """Finite differences along a random direction, of all inputs at once."""
    case = make_case(
        memory, aggregation, tokens=5, batch=1, heads=1, segment_size=2, state_init_mode=mode
    )
    inputs = arrays(case)
    given = leaves(inputs)

    def function(*tensors):
        rest = iter(tensors)
        return projected(call({k: _filled(x, rest) for k, x in inputs.items()}, case))

    (gradcheck if order == 1 else gradgradcheck)(function, given, fast_mode=True)


def _filled(tree, tensors):
    return tree_map(lambda _: next(tensors), tree)


@pytest.mark.parametrize(("memory", "aggregation", "mode"), DERIVATIVES)
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_are_slopes(memory, aggregation, mode, order):
    check_derivatives(memory, aggregation, mode, order)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation"), list(product(MEMORIES, AGGREGATIONS)))
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_of_all_pairs(memory, aggregation, order):
    check_derivatives(memory, aggregation, "checkpoint", order)


@pytest.mark.parametrize("width", [1, 2, 5, 12])
def test_a_level_is_the_number_of_bits_of_an_age(width):
    u, age = torch.arange(width), torch.arange(-3, 2000)
    expected = [min(max(x, 0).bit_length(), width - 1) for x in age.tolist()]
    assert at_level(u, age).tolist() == expected


@pytest.mark.parametrize("gated_by", GATES)
@pytest.mark.parametrize("block", [512, 3])
def test_gates_of_selected_memories_are_those_of_all(block, gated_by, monkeypatch):
    """The fast form against `gate_densely`, in one block of tokens and in several."""
    monkeypatch.setattr("mc_torch.gates.BLOCK", block)
    rng = np.random.default_rng(0)
    u, running = torch.from_numpy(rng.standard_normal((2, 2, 7, 3, 4)))
    pools = torch.from_numpy(rng.standard_normal((2, 5, 3, 4)))
    segment = torch.tensor([0, 1, 2, 3, 4, 4, 2])
    config = MCConfig(8, 2, aggregation="ssc", ssc_top_k=2, gate=gated_by)
    weights, selected = gate(u, pools, running, segment, config)
    assert weights.shape == (2, 7, 3, 3)
    score = scores(u, pools, running, segment, config)
    expected = gate_densely(score, segment, config)
    torch.testing.assert_close(spread(weights, selected, 5), expected)
