"""Chunked and recurrent methods match the oracle (sections 2 to 5) and each other's gradients.

Compilation dominates the run time, so static choices come from covering arrays. PyTorch needs no
compilation, so random search is in `test_torch_recurrence`. Its gradients are the reference here.
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
    KINDS,
    MASKS,
    MODES,
    FunctionCase,
    assert_close,
    expand_mask,
    make_case,
)
from helpers.covering_arrays import numbered, pairwise
from helpers.jax_calls import arrays, call, gradients, projected, run, run_with_gradients
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
    with_layouts,
)

pytestmark = pytest.mark.usefixtures("float64", "strict")

# Variants of each kind, used in turn.
VARIANTS = {
    "linear": ("linear", "linear-elu", "linear-normalized"),
    "swla": ("swla",),
    "dla": ("dla", "dla-initial", "dla-flat", "dla-deep", "dla-orthogonal"),
    "titans": (
        "titans",
        "titans-initial",
        "titans-flat",
        "titans-norm",
        "titans-dot",
        "titans-orthogonal",
    ),
}
CASES = pairwise(
    kind=KINDS,
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
    gate_bias=(None, 1.0),
    pool_norm=("none", "l2"),
)


def numbered_case(number: int) -> FunctionCase:
    options = dict(CASES[number])
    variants = VARIANTS[options.pop("kind")]
    case = make_case(variants[number % len(variants)], **options, tokens=13, seed=number)
    return case._replace(u=None) if case.config.use_q_as_u else case


def check(case: FunctionCase) -> None:
    results = [run(case, method) for method in METHODS]
    for result in results:
        assert_matches_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


@pytest.mark.parametrize(
    "number", numbered(CASES, len(AGGREGATIONS), {4, 9, 12, 14, 19, 23, 24, 28})
)
def test_both_methods_match_oracle(number):
    """Sections 2 to 5, at a length that is no multiple of segment or chunk size."""
    check(numbered_case(number))


def test_cases_cover_all_pairs_and_variants():
    configs = [numbered_case(number).config for number in range(len(CASES))]
    pairs = {(config.memory.kind, config.aggregation) for config in configs}
    assert pairs == set(product(KINDS, AGGREGATIONS))
    assert len({config.memory for config in configs}) == sum(map(len, VARIANTS.values()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:segmentation = .logarithmic.")
@given(case=random_cases())
@settings(examples, max_examples=150)
def test_both_methods_match_oracle_on_large_grid(case):
    check(case)
    jax.clear_caches()  # programs use memory maps, and a process is limited to 65,530


@pytest.mark.parametrize(
    ("edge", "memory", "mode"),
    [
        pytest.param("one-token", "titans", "restart", marks=pytest.mark.slow),
        pytest.param("one-short-segment", "swla", "restart", marks=pytest.mark.slow),
        pytest.param("segments-of-one", "swla", "checkpoint", marks=pytest.mark.slow),
        ("uneven", "titans", "restart"),
        ("masked-segment", "swla", "restart"),
        ("uneven", "delta", "checkpoint"),
        ("uneven", "titans-last-initial", "checkpoint"),
        ("uneven", "dla-orthogonal", "restart"),
    ],
)
def test_segment_edges_match_oracle(edge, memory, mode):
    check(make_case(memory, "grm", state_init_mode=mode, **EDGES[edge]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "mode"), [("swla", "checkpoint"), ("swla", "restart"), ("titans", "restart")]
)
@pytest.mark.parametrize("edge", EDGES)
def test_segment_edges_match_oracle_on_large_grid(edge, memory, mode):
    check(make_case(memory, "grm", state_init_mode=mode, **EDGES[edge]))


def check_with_gradients(case: FunctionCase, method: str = "chunked") -> None:
    """Compare outputs with the oracle, and gradients with those of the other method in PyTorch."""
    result, actual = run_with_gradients(case, method)
    assert_matches_oracle(result, case)
    other = next(name for name in METHODS if name != method)
    assert_close(actual, torch_calls.gradients(case, other), GRADIENT, name="gradient")


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        pytest.param("swla", "grm", "checkpoint", marks=pytest.mark.slow),
        ("titans", "ssc", "restart"),
    ],
)
def test_masked_tokens_do_not_change_outputs(memory, aggregation, mode):
    """NaN at masked tokens does not reach outputs and gradients; their outputs and gates are 0."""
    case = make_case(memory, aggregation, state_init_mode=mode, mask="segment")
    poisoned = case.map_inputs(lambda x: np.where(expand_mask(case.mask, x), x, np.nan))
    function = jax.jit(
        jax.value_and_grad(
            lambda x: (lambda r: (jnp.sum(jnp.sin(r.output)), r))(call(x, case)), has_aux=True
        )
    )
    clean, masked_result = function(arrays(case)), function(arrays(poisoned))
    for left, right in zip(jax.tree.leaves(clean), jax.tree.leaves(masked_result), strict=True):
        np.testing.assert_array_equal(left, right)
        assert np.isfinite(np.asarray(right)).all()
    (_, result), grads = masked_result
    assert not np.asarray(result.output)[~case.mask].any()
    assert not np.asarray(result.gates)[~case.mask].any()
    for name in "qkv":
        assert not np.asarray(grads[name])[~case.mask].any()
    recurrent = run(poisoned, "recurrent")
    assert_close(recurrent.output, result.output, EXACT)


@pytest.mark.parametrize(
    "memory",
    [kind if kind == "dla" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_chunked_matches_recurrent_with_zero_retention(memory):
    """Retention and momentum at and near 0: values and gradients."""
    check_with_gradients(
        make_case(memory, "residual", segment_size=11, chunk_size=11).with_zero_decay()
    )


# All pairs are slow tests, also the first of these; PyTorch compares each memory quickly.
PAIRS = (
    ("titans-norm", "residual"),
    ("linear", "none"),
    ("titans-last-initial", "soup"),
    ("titans-orthogonal", "grm"),
)


def check_gradients(memory: str, aggregation: str, options: dict[str, Any]) -> None:
    case = make_case(memory, aggregation, **options)
    results = [gradients(case, method) for method in METHODS]
    assert_close(*results, GRADIENT, name="gradient")
    for name in "qkv":
        assert np.abs(results[0][name]).max() > 1e-3, f"no gradient reaches {name}"


@pytest.mark.parametrize(
    ("memory", "aggregation", "options"),
    [
        pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if i == 0 else ())
        for i, case in enumerate(with_layouts(PAIRS))
    ],
)
def test_chunked_gradients_match_recurrent(memory, aggregation, options):
    """Section 6: gradients of q, k, v, u, coefficients, initial, norm; also through the cache."""
    check_gradients(memory, aggregation, options)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation", "options"), all_pairs())
def test_chunked_gradients_match_recurrent_for_all_pairs(memory, aggregation, options):
    check_gradients(memory, aggregation, options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("memory", "aggregation", "options"), with_layouts(product(KINDS, AGGREGATIONS))
)
def test_chunked_gradients_match_recurrent_for_other_masks_and_modes(
    memory, aggregation, options, seed
):
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
        pytest.param("swla", "ssc", "checkpoint", "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "ssc", "restart", "chunked", marks=pytest.mark.slow),
        pytest.param("titans", "soup", "checkpoint", "chunked", marks=pytest.mark.slow),
    ],
)
def test_token_gates_match_oracle(memory, aggregation, mode, method):
    """Levels of log-linear attention, and their gradients."""
    options = TOKEN_GATES | {"state_init_mode": mode}
    check_with_gradients(make_case(memory, aggregation, **options), method)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation", "mode"), list(product(KINDS, GATED, MODES)))
def test_token_gates_match_oracle_on_large_grid(memory, aggregation, mode):
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
def test_token_gates_are_independent_of_keys(aggregation, method):
    """Gates have no gradient to k and do not depend on k, unlike with `gate="context"`."""
    case = make_case("linear", aggregation, tokens=9)

    def total(inputs, case):
        gates = call(inputs, case, method).gates
        return jnp.sum(jnp.sin(gates)), gates

    for gate in GATES:
        gate_case = case.with_config(gate=gate)
        both = jax.jit(
            jax.value_and_grad(lambda x, gate_case=gate_case: total(x, gate_case), has_aux=True)
        )
        inputs = arrays(gate_case)
        (_, gates), gradient = both(inputs)
        (_, other), _ = both(inputs | {"k": -inputs["k"]})
        depends = np.asarray(gradient["k"]).any(), (np.asarray(gates) != other).any()
        assert depends == ((True, True) if gate == "context" else (False, False)), gate
        assert np.asarray(gradient["u"]).any()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["linear", pytest.param("titans-norm", marks=pytest.mark.slow)])
def test_gradients_match_finite_differences(memory):
    """Finite differences detect errors that both methods share."""
    case = make_case(memory, "grm", tokens=5, batch=1, segment_size=2, chunk_size=2)
    loss = lambda inputs: projected(call(inputs, case))  # noqa: E731
    check_grads(jax.jit(loss), (arrays(case),), order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_detaching_stops_only_cached_gradients():
    case = make_case(
        "linear", "grm", tokens=8, segment_size=4, chunk_size=2, state_init_mode="restart"
    )
    last = jnp.asarray(np.arange(8) >= 4, jnp.float64)[None, :, None, None]
    grads = {}
    for states, context in product((False, True), repeat=2):
        detached = case.with_config(detach_cached_states=states, detach_cached_context=context)
        loss = lambda x, detached=detached: jnp.sum(jnp.sin(call(x, detached).output) * last)  # noqa: E731
        grads[states, context] = jax.jit(jax.grad(loss))(arrays(detached))
    first = {key: np.asarray(g["k"])[:, :4] for key, g in grads.items()}
    assert np.abs(first[False, False]).max() > 1e-4
    assert np.abs(first[True, False]).max() > 1e-4  # through pooled keys
    assert np.abs(first[False, True]).max() > 1e-4  # through memories
    assert not first[True, True].any()
    # In restart mode, values of an earlier segment affect later reads only through its memory.
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
        pytest.param("linear", "grm", "recurrent", marks=pytest.mark.slow),
        pytest.param("linear", "residual", "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "soup", "chunked", marks=pytest.mark.slow),
        pytest.param("dla", "soup", "recurrent", marks=pytest.mark.slow),
    ],
)
def test_detached_gradients_match_between_methods(memory, aggregation, method):
    """The other method runs in PyTorch, whose detached gradients are tested separately."""
    case = make_case(memory, aggregation, tokens=9, detach_cached_states=True)
    check_with_gradients(case.with_config(detach_cached_context=True), method)
