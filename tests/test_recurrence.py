"""Both methods against the oracle (sections 2 to 5), and against each other in their gradients."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import (
    AGGREGATIONS,
    GATED,
    GATES,
    MAIN,
    MASKS,
    MEMORIES,
    MODES,
    Case,
    assert_close,
    make_case,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from subject import arrays, call, gradients, projected, run

from mc_jax import Result

pytestmark = pytest.mark.usefixtures("float64", "strict")
METHODS = ("chunked", "recurrent")
EXACT, GRADIENT = 1e-10, 1e-9


def hold_to_oracle(result: Result, case: Case) -> None:
    """Compare output, gates, cached states and pools, counts, and what the stream carries on."""
    expected = oracle.memory_caching(*case[:6], **case.oracle_options)
    segments, state = result.cache.segments, result.cache.state
    weights = segments.weights
    if expected.normalizers is not None:  # mc_jax keeps it as the last row of W
        weights, normalizers = (weights[0][..., :-1, :],), weights[0][..., -1, :]
        assert_close(normalizers, expected.normalizers, EXACT, name="normalizers")
    assert_close(result.output, expected.output, EXACT, name="output")
    assert_close(result.gates, expected.gates, EXACT, name="gates")
    assert_close(weights, expected.states, EXACT, name="states")
    assert_close(segments.pool, expected.pools, EXACT, name="pools")
    assert_close(state.momentum, expected.momentum or (), EXACT, name="momentum")
    assert_close(state.weights, [w[:, -1] for w in segments.weights], EXACT, name="online")
    ends = np.cumsum(oracle.lengths_of(case.tokens, case.config, case.lengths))
    mask = np.ones(case.q.shape[:2], bool) if case.mask is None else case.mask
    counts = np.add.reduceat(mask, [0, *ends[:-1]], axis=1)
    np.testing.assert_array_equal(segments.length, counts)
    np.testing.assert_array_equal(result.cache.length, counts[:, -1])
    np.testing.assert_array_equal(result.cache.position, case.tokens)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(1, 21))
    lengths = None
    if draw(st.integers(0, 3)) == 0:
        cuts = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=4)) - {tokens}
        lengths = tuple(int(x) for x in np.diff([0, *sorted(cuts), tokens]))
    aggregation = draw(st.sampled_from(AGGREGATIONS))
    case = make_case(
        draw(st.sampled_from(sorted(MEMORIES))),
        aggregation,
        tokens=tokens,
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        mask=draw(st.sampled_from(MASKS)),
        lengths=lengths,
        seed=draw(st.integers(0, 99)),
        segmentation=draw(st.sampled_from(["constant", "constant", "logarithmic"])),
        segment_size=draw(st.integers(1, 8)),
        chunk_size=draw(st.integers(1, 9)),
        state_init_mode=draw(st.sampled_from(MODES)),
        ssc_top_k=draw(st.integers(1, 4)),
        pooling=draw(st.sampled_from(["mean", "sum"])),
        softmax_temperature=draw(st.sampled_from([1.0, 0.3])),
        use_q_as_u=draw(st.booleans()),
        gate=draw(st.sampled_from(GATES)),
    )
    return case._replace(u=None) if case.config.use_q_as_u else case


def check(case: Case) -> None:
    results = [run(case, method) for method in METHODS]
    for result in results:
        hold_to_oracle(result, case)
    assert_close(*results, EXACT, name="methods")


# Not shrunk: each smaller example compiles anew, and a case of 21 tokens is small as it is.
examples = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow],
)


@given(case=random_cases())
@settings(examples, max_examples=24)
def test_both_methods_are_the_oracle(case):
    """Sections 2 to 5, at lengths that divide nothing."""
    check(case)


@pytest.mark.slow
@given(case=random_cases())
@settings(examples, max_examples=400)
def test_both_methods_are_the_oracle_on_a_large_grid(case):
    check(case)
    jax.clear_caches()  # a program is some maps of memory, of which a process may have 65,530


@pytest.mark.parametrize(
    ("memory", "mode"), [("swla", "checkpoint"), ("swla", "restart"), ("titans", "restart")]
)
@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1},
        {"tokens": 5, "segment_size": 9, "chunk_size": 20},
        {"tokens": 7, "segment_size": 1},
        {"tokens": 14, "lengths": (7, 1, 4, 1, 1), "chunk_size": 2, "mask": "some"},
        {"tokens": 9, "mask": "segment", "segment_size": 3, "chunk_size": 2},
    ],
    ids=["one-token", "one-short-segment", "segments-of-one", "uneven", "masked-segment"],
)
def test_edges_of_segments(memory, mode, options):
    check(make_case(memory, "grm", state_init_mode=mode, **options))


@pytest.mark.parametrize("memory", MAIN)
def test_a_past_that_is_let_go(memory):
    """Retention and momentum of 0 and next to it: values, and gradients by them, too."""
    case = make_case(memory, "residual", segment_size=11, chunk_size=11).closing()
    check(case)
    assert_close(*(gradients(case, method) for method in METHODS), GRADIENT, name="gradient")


# Each memory and each aggregation, at the least expense; all pairs are among the slow ones.
QUICK = (
    ("linear", "residual"),
    ("linear", "ssc"),
    ("linear-normalized", "soup"),
    ("swla", "none"),
    ("swla", "grm"),
    ("dla", "ssc"),
    ("dla", "mean"),
    ("titans", "grm"),
    ("titans", "soup"),
    ("titans-norm", "residual"),
)


def paired(pairs: Any) -> list[Any]:
    """Spread start modes, masks and layouts over pairs of a memory and an aggregation."""
    layouts = ({}, {"chunk_size": 1}, {"chunk_size": 2, "segment_size": 5}, {"segment_size": 7})
    out = []
    for i, (memory, aggregation) in enumerate(pairs):
        options = {**layouts[i % 4], "state_init_mode": MODES[(i + i // 6) % 2]}
        mask = MASKS[i % 5]
        name = "-".join(map(str, (memory, aggregation, mask, *options.values())))
        options |= {"tokens": 13 - i % 3, "ssc_top_k": 1 + i % 2, "mask": mask, "seed": i}
        out.append(pytest.param(memory, aggregation, options, id=name))
    return out


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
@pytest.mark.parametrize(
    ("memory", "aggregation", "options"), paired(product(MEMORIES, AGGREGATIONS))
)
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


# Memories up to 9 segments old, so that there are more levels than the 4 components of u.
TOKEN_GATES = {"gate": "token", "tokens": 19, "segment_size": 2, "mask": "some"}


def check_token_gates(memory: str, aggregation: str, mode: str) -> None:
    options = TOKEN_GATES | {"state_init_mode": mode}
    check(make_case(memory, aggregation, **options))
    check_gradients(memory, aggregation, options)


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("linear", "grm", "restart"),
        ("swla", "ssc", "checkpoint"),
        ("dla", "ssc", "restart"),
        ("titans", "soup", "checkpoint"),
    ],
)
def test_gates_of_the_token_alone(memory, aggregation, mode):
    """The levels of log-linear attention: both methods, and their gradients."""
    check_token_gates(memory, aggregation, mode)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "aggregation", "mode"), list(product(MAIN, GATED, MODES)))
def test_gates_of_the_token_alone_everywhere(memory, aggregation, mode):
    check_token_gates(memory, aggregation, mode)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("aggregation", GATED)
def test_gates_of_the_token_alone_see_no_key(aggregation, method):
    """No gradient of theirs reaches k, and other keys leave them as they are; not so `context`."""
    case = make_case("linear", aggregation, tokens=9)
    total = lambda inputs, case: jnp.sum(jnp.sin(call(inputs, case, method).gates))  # noqa: E731
    for gate in GATES:
        own = case.where(gate=gate)
        gradient = jax.jit(jax.grad(lambda inputs, own=own: total(inputs, own)))(arrays(own))
        other = run(own._replace(k=-own.k), method).gates
        seen = np.asarray(gradient["k"]).any(), (np.asarray(run(own, method).gates) != other).any()
        assert seen == ((True, True) if gate == "context" else (False, False)), gate
        assert np.asarray(gradient["u"]).any()


@pytest.mark.parametrize("memory", ["linear", "titans-norm"])
def test_gradients_are_slopes(memory):
    """Finite differences: the two methods could share a mistake that the oracle cannot see."""
    case = make_case(memory, "grm", tokens=5, batch=1, segment_size=2, chunk_size=2)
    loss = lambda inputs: projected(call(inputs, case))  # noqa: E731
    check_grads(jax.jit(loss), (arrays(case),), order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


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
    ("memory", "aggregation"),
    [("linear", "grm"), ("linear", "residual"), ("dla", "soup")],
)
def test_both_methods_detach_alike(memory, aggregation):
    case = make_case(memory, aggregation, tokens=9, detach_cached_states=True)
    case = case.where(detach_cached_context=True)
    loss = lambda x, method: jnp.sum(jnp.sin(call(x, case, method).output))  # noqa: E731
    chunked, recurrent = (
        jax.jit(jax.grad(loss), static_argnums=1)(arrays(case), method) for method in METHODS
    )
    assert_close(chunked, recurrent, GRADIENT)
