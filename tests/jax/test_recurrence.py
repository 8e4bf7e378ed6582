"""Both methods against the oracle (sections 2 to 5), and their gradients.

Compilation takes nearly all of the time, so that static choices come from covering arrays. PyTorch
compiles nothing: `test_torch_recurrence` searches at random, and its gradients are the reference of
gradients here. `test_parity` compares both frameworks at every kind and aggregation.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.test_util import check_grads

from helpers import torch_calls
from helpers.cases import (
    AGGREGATIONS,
    GATED,
    GATES,
    MAIN,
    MASKS,
    MODES,
    FunctionCase,
    assert_close,
    make_case,
)
from helpers.covering_arrays import pairwise
from helpers.jax_calls import arrays, call, gradients, projected, run, run_with_gradients
from helpers.recurrence_cases import (
    EDGES,
    EXACT,
    GRADIENT,
    METHODS,
    TOKEN_GATES,
    all_pairs,
    examples,
    hold_to_oracle,
    paired,
    random_cases,
)

pytestmark = pytest.mark.usefixtures("float64", "strict")

# Each kind's variants take turns.
VARIANTS = {
    "linear": ("linear", "linear-elu", "linear-normalized"),
    "swla": ("swla",),
    "dla": ("dla", "dla-flat", "dla-deep"),
    "titans": ("titans", "titans-flat", "titans-norm", "titans-dot"),
}
CASES = pairwise(
    kind=MAIN,
    aggregation=AGGREGATIONS,
    mask=("some", "padded", "segment", "row"),
    state_init_mode=MODES,
    gate=GATES,
    segmentation=("constant", "logarithmic"),
    pooling=("mean", "sum"),
    chunk_size=(3, 1, 2, 9),
    segment_size=(4, 1, 5),
    ssc_top_k=(2, 1, 4),
    softmax_temperature=(1.0, 0.3),
    use_q_as_u=(False, True),
)


def case_of(number: int) -> FunctionCase:
    options = dict(CASES[number])
    variants = VARIANTS[options.pop("kind")]
    case = make_case(variants[number % len(variants)], **options, tokens=13, seed=number)
    return case._replace(u=None) if case.config.use_q_as_u else case


def check(case: FunctionCase) -> None:
    results = [run(case, method) for method in METHODS]
    for result in results:
        hold_to_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=["-".join(map(str, row.values())) for row in CASES]
)
def test_both_methods_are_the_oracle(number):
    """Sections 2 to 5, at a length that nothing divides."""
    check(case_of(number))


def test_the_cases_have_all_pairs_and_all_variants():
    configs = [case_of(number).config for number in range(len(CASES))]
    pairs = {(config.memory.kind, config.aggregation) for config in configs}
    assert pairs == set(product(MAIN, AGGREGATIONS))
    assert len({config.memory for config in configs}) == sum(map(len, VARIANTS.values()))


@pytest.mark.slow
@given(case=random_cases())
@settings(examples, max_examples=400)
def test_both_methods_are_the_oracle_on_a_large_grid(case):
    check(case)
    jax.clear_caches()  # a program is some maps of memory, of which a process may have 65,530


@pytest.mark.parametrize(
    ("edge", "memory", "mode"),
    [
        ("one-token", "titans", "restart"),
        ("one-short-segment", "swla", "restart"),
        ("segments-of-one", "swla", "checkpoint"),
        ("uneven", "titans", "restart"),
        ("masked-segment", "swla", "restart"),
    ],
)
def test_edges_of_segments(edge, memory, mode):
    check(make_case(memory, "grm", state_init_mode=mode, **EDGES[edge]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "mode"), [("swla", "checkpoint"), ("swla", "restart"), ("titans", "restart")]
)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_segments_everywhere(edge, memory, mode):
    check(make_case(memory, "grm", state_init_mode=mode, **EDGES[edge]))


def check_with_gradients(case: FunctionCase, method: str = "chunked") -> None:
    """Compare with the oracle, and gradients with PyTorch's, of the other method."""
    result, found = run_with_gradients(case, method)
    hold_to_oracle(result, case)
    other = next(name for name in METHODS if name != method)
    assert_close(found, torch_calls.gradients(case, other), GRADIENT, name="gradient")


@pytest.mark.parametrize("memory", MAIN)
def test_a_past_that_is_let_go(memory):
    """Retention and momentum of 0 and next to it: values, and gradients by them, too."""
    check_with_gradients(make_case(memory, "residual", segment_size=11, chunk_size=11).closing())


# Each kind and each aggregation, at the least expense; all pairs are among the slow ones.
QUICK = (
    ("linear-normalized", "soup"),
    ("swla", "grm"),
    ("dla", "mean"),
    ("titans-norm", "residual"),
    ("titans", "ssc"),
    ("linear", "none"),
)


def check_gradients(memory: str, aggregation: str, options: dict[str, Any]) -> None:
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
@pytest.mark.parametrize(("memory", "aggregation", "options"), all_pairs())
def test_gradients_of_all_pairs(memory, aggregation, options):
    check_gradients(memory, aggregation, options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("memory", "aggregation", "options"), paired(product(MAIN, AGGREGATIONS)))
def test_gradients_under_other_masks_and_modes(memory, aggregation, options, seed):
    options = options | {
        "mask": MASKS[(options["seed"] + seed + 1) % 5],
        "state_init_mode": MODES[seed],
        "segmentation": "logarithmic" if seed else "constant",
        "tokens": 14 + seed,
        "pooling": "sum",
    }
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode", "method"),
    [
        ("linear", "grm", "restart", "recurrent"),
        ("swla", "ssc", "checkpoint", "chunked"),
        pytest.param("dla", "ssc", "restart", "chunked", marks=pytest.mark.slow),
        ("titans", "soup", "checkpoint", "chunked"),
    ],
)
def test_gates_of_the_token_alone(memory, aggregation, mode, method):
    """The levels of log-linear attention, and their gradients."""
    options = TOKEN_GATES | {"state_init_mode": mode}
    check_with_gradients(make_case(memory, aggregation, **options), method)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation", "mode"), list(product(MAIN, GATED, MODES)))
def test_gates_of_the_token_alone_everywhere(memory, aggregation, mode):
    options = TOKEN_GATES | {"state_init_mode": mode}
    check(make_case(memory, aggregation, **options))
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize(
    ("aggregation", "method"),
    [
        ("grm", "chunked"),
        pytest.param("soup", "recurrent", marks=pytest.mark.slow),
        pytest.param("ssc", "chunked", marks=pytest.mark.slow),
    ],
)
def test_gates_of_the_token_alone_see_no_key(aggregation, method):
    """No gradient of theirs reaches k, and other keys leave them as they are; not so `context`."""
    case = make_case("linear", aggregation, tokens=9)

    def total(inputs, case):
        gates = call(inputs, case, method).gates
        return jnp.sum(jnp.sin(gates)), gates

    for gate in GATES:
        own = case.where(gate=gate)
        both = jax.jit(jax.value_and_grad(lambda x, own=own: total(x, own), has_aux=True))
        inputs = arrays(own)
        (_, gates), gradient = both(inputs)
        (_, other), _ = both(inputs | {"k": -inputs["k"]})
        seen = np.asarray(gradient["k"]).any(), (np.asarray(gates) != other).any()
        assert seen == ((True, True) if gate == "context" else (False, False)), gate
        assert np.asarray(gradient["u"]).any()


@pytest.mark.parametrize("memory", ["linear", pytest.param("titans-norm", marks=pytest.mark.slow)])
def test_gradients_are_slopes(memory):
    """Finite differences: the two methods could share a mistake that the oracle cannot see."""
    case = make_case(memory, "grm", tokens=5, batch=1, segment_size=2, chunk_size=2)
    loss = lambda inputs: projected(call(inputs, case))  # noqa: E731
    check_grads(jax.jit(loss), (arrays(case),), order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_detaching_cuts_the_gradient_of_what_is_cached_and_no_other():
    case = make_case(
        "linear", "grm", tokens=8, segment_size=4, chunk_size=2, state_init_mode="restart"
    )
    last = jnp.asarray(np.arange(8) >= 4, jnp.float64)[None, :, None, None]
    grads = {}
    for states, context in product((False, True), repeat=2):
        cut = case.where(detach_cached_states=states, detach_cached_context=context)
        loss = lambda x, cut=cut: jnp.sum(jnp.sin(call(x, cut).output) * last)  # noqa: E731
        grads[states, context] = jax.jit(jax.grad(loss))(arrays(cut))
    first = {key: np.asarray(g["k"])[:, :4] for key, g in grads.items()}
    assert np.abs(first[False, False]).max() > 1e-4
    assert np.abs(first[True, False]).max() > 1e-4  # the pooled keys are left
    assert np.abs(first[False, True]).max() > 1e-4  # the memories are left
    assert not first[True, True].any()
    # In restart mode the values of an earlier segment reach later reads by its memory alone.
    assert not np.asarray(grads[True, False]["v"])[:, :4].any()
    assert_close(grads[False, True]["v"], grads[False, False]["v"], GRADIENT)
    for name in ("q", "u"):
        assert_close(grads[True, True][name], grads[False, False][name], GRADIENT, name=name)
    later = [np.asarray(g["v"])[:, 4:] for g in grads.values()]
    for other in later[1:]:
        assert_close(other, later[0], GRADIENT, name="v of the online segment")


@pytest.mark.parametrize(
    ("memory", "aggregation", "method"),
    [
        ("linear", "grm", "chunked"),
        ("linear", "grm", "recurrent"),
        pytest.param("linear", "residual", "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "soup", "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "soup", "recurrent", marks=pytest.mark.slow),
    ],
)
def test_both_methods_detach_alike(memory, aggregation, method):
    """The other method is PyTorch's, where the test above holds, too."""
    case = make_case(memory, aggregation, tokens=9, detach_cached_states=True)
    check_with_gradients(case.where(detach_cached_context=True), method)
