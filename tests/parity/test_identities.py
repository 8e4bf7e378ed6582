"""Exact identities (section 5), causality, and properties of deep memories.

The chunked form has special cases for some of them, so it is compared with the recurrent form.
PyTorch, which need not compile, checks all of them quickly; JAX, those that select a form of read.
"""

from types import ModuleType

import numpy as np
import pytest

from helpers import jax_calls, torch_calls
from helpers.cases import AGGREGATIONS, GATED, FunctionCase, assert_close, expand_mask, make_case
from mc_core import DeltaConfig, DLAConfig, LinearConfig, TitansConfig

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10
DEEP = ("dla", "dla-deep", "dla-last", "titans", "titans-norm", "titans-last")


PACKAGES = {"jax": jax_calls, "torch": torch_calls}
IN_BOTH = pytest.mark.parametrize("package", PACKAGES, indirect=True)


@pytest.fixture(params=["torch", pytest.param("jax", marks=pytest.mark.slow)])
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Helpers that run a case in one of the packages."""
    return PACKAGES[request.param]


def assert_same_results(
    package: ModuleType,
    left: FunctionCase,
    right: FunctionCase,
    *,
    gates: bool = True,
    cache: bool = True,
) -> None:
    """Compare a recurrent run of one case with a chunked run of the other."""
    a, b = package.run(left, "recurrent"), package.run(right)
    assert_close(a.output, b.output, EXACT, name="output")
    if gates:
        assert_close(a.gates, b.gates, EXACT, name="gates")
    if cache:
        # The sum of memories and the number of slots depend on the aggregation.
        a, b = (x.cache._replace(total=()) for x in (a, b))
        assert_close(a, b, EXACT, name="cache")


@pytest.mark.parametrize("memory", ["swla", "titans"])
def test_single_segment_equals_no_caching(package, memory):
    """Every aggregation reads only the online memory, with γ = 1."""
    none = package.run(make_case(memory, "none", tokens=6, segment_size=6))
    for i, aggregation in enumerate(AGGREGATIONS[1:]):
        case = make_case(memory, aggregation, tokens=6, segment_size=6)
        result = package.run(case, ("chunked", "recurrent")[i % 2])
        assert_close(result.output, none.output, EXACT, name=aggregation)
        assert_close(result.gates, none.gates, EXACT, name=aggregation)
        assert_close(np.asarray(result.gates)[..., -1], np.ones((2, 6, 2)), EXACT)


@IN_BOTH
@pytest.mark.parametrize(
    ("memory", "mode"),
    [("linear-elu", "restart"), pytest.param("swla", "checkpoint", marks=pytest.mark.slow)],
)
def test_soup_equals_grm_for_matrix_memories(package, memory, mode):
    """A matrix memory's read is linear in its weights (equations 9 and 15)."""
    case = make_case(memory, "soup", state_init_mode=mode, mask="some")
    assert_same_results(package, case, case.with_config(aggregation="grm"))


def test_soup_differs_from_grm_for_normalized_or_deep_memories(package):
    for memory in ("linear-normalized", "dla"):
        soup, grm = (package.run(make_case(memory, a)).output for a in ("soup", "grm"))
        assert np.abs(np.asarray(soup - grm)).max() > 1e-4


@pytest.mark.parametrize(
    ("memory", "mode", "gate"),
    [
        ("swla", "restart", "context"),
        ("linear-normalized", "checkpoint", "context"),
        ("titans", "restart", "context"),
        ("swla", "checkpoint", "token"),
    ],
)
def test_ssc_with_all_segments_equals_grm(package, memory, mode, gate):
    """Equation 16 with top_k >= N."""
    case = make_case(memory, "ssc", state_init_mode=mode, ssc_top_k=9, mask="some", gate=gate)
    assert_same_results(package, case.with_config(aggregation="grm"), case)


@pytest.mark.parametrize(("memory", "mode"), [("linear", "checkpoint"), ("dla", "restart")])
def test_grm_with_zero_connector_equals_mean(package, memory, mode):
    case = make_case(memory, "grm", state_init_mode=mode)
    case = case._replace(u=np.zeros_like(case.u))
    assert_same_results(package, case, case._replace(u=None).with_config(aggregation="mean"))


@pytest.mark.parametrize("aggregation", GATED)
def test_large_gate_bias_equals_no_caching(package, aggregation):
    """Reads start at the online memory; equal to the last bit where the other gates underflow."""
    case = make_case("titans", aggregation, mask="some", gate_bias=0.0)
    case = case._replace(gate_bias=np.full(2, 1e4))
    none = package.run(make_case("titans", "none", mask="some"))
    for method in ("chunked", "recurrent"):
        assert_close(package.run(case, method).output, none.output, EXACT)


def test_normalized_pools_bound_scores(package):
    """Gates of keys with norm 1e6 are those of scores of at most |u|."""
    case = make_case("linear", "grm", pool_norm="l2", pooling="sum")
    case = case._replace(k=1e6 * case.k, u=0.1 * case.u)
    gates = np.asarray(package.run(case).gates)[:, -1]
    gates = np.delete(gates, 3, axis=-1)  # the slot of the online segment
    spread = np.log(gates.max(-1) / gates.min(-1))
    assert (spread <= 2 * np.linalg.norm(case.u[:, -1], axis=-1)).all()


@IN_BOTH
@pytest.mark.parametrize("memory", ["linear", pytest.param("linear-elu", marks=pytest.mark.slow)])
def test_residual_with_restart_equals_undivided_linear_attention(package, memory):
    """Equation 7 without decay and with zero initial memory."""
    case = make_case(memory, "residual", state_init_mode="restart", mask="some")
    case = case._replace(
        initial=(np.zeros_like(case.initial[0]),),
        coefficients=case.coefficients._replace(retention=np.ones((2, 13, 2))),
    )
    undivided = case.with_config(aggregation="none", segment_size=13)
    assert_same_results(package, case, undivided, gates=False, cache=False)
    assert_same_results(package, undivided, case, gates=False, cache=False)


def test_checkpoint_state_is_independent_of_segments(package):
    """Without cached reads, segment boundaries do not affect matrix memories."""
    for memory in ("linear", "swla"):
        case = make_case(memory, "none", mask="some")
        assert_same_results(
            package, case, case.with_config(segment_size=13), gates=False, cache=False
        )


@pytest.mark.parametrize(
    "memory",
    ["linear", "linear-normalized", "swla", "delta", "titans-last", "titans-last-initial"],
)
def test_memory_is_independent_of_chunk_size(package, memory):
    """The gradient does not depend on the memory, or is exact for every chunk (section 2)."""
    case = make_case(memory, "grm", chunk_size=1)
    assert_same_results(package, case, case.with_config(chunk_size=4))


def test_depth_one_mlp_with_dot_loss_is_linear_attention(package):
    """Section 2: `dla` of depth 1 is `linear`."""
    case = make_case(DLAConfig(depth=1, residual=False, inner_clip=None), "grm")
    assert_same_results(package, case, case.with_config(memory=LinearConfig()), cache=False)


def test_depth_one_mlp_with_l2_loss_is_delta_rule_with_momentum(package):
    """Equations 34 and 35 with gradient descent, computed explicitly for one head."""
    memory = TitansConfig(depth=1, residual=False, inner_clip=None)
    case = make_case(memory, "none", tokens=6, batch=1, heads=1, chunk_size=1)
    eta, alpha, beta = (x[0, :, 0] for x in case.coefficients[:3])
    w, s, outputs = case.initial[0][0], 0.0, []
    for t in range(6):
        k, v = case.k[0, t, 0], case.v[0, t, 0]
        s = beta[t] * s - eta[t] * 2 * np.outer(w @ k - v, k)
        w = alpha[t] * w + s
        outputs.append(w @ case.q[0, t, 0])
    result = package.run(case)
    assert_close(np.asarray(result.output)[0, :, 0], np.array(outputs), EXACT)
    assert_close(np.asarray(result.cache.state.momentum[0])[0, 0], s, EXACT)


def test_delta_rule_is_depth_one_titans_without_momentum_and_decay(package):
    """Section 2: with chunks of one token, and half the step, because the L2 loss has no half."""
    memory = TitansConfig(depth=1, residual=False, inner_clip=None)
    case = make_case(memory, "grm", chunk_size=1, mask="some")
    ones = np.ones_like(case.coefficients.step)
    coefficients = case.coefficients._replace(retention=ones, momentum=0 * ones)
    delta = coefficients._replace(step=2 * coefficients.step, momentum=None)
    other = case.with_config(memory=DeltaConfig(), chunk_size=4)
    case, other = case._replace(coefficients=coefficients), other._replace(coefficients=delta)
    assert_close(package.run(case, "recurrent").output, package.run(other).output, EXACT)


def test_written_last_layer_of_depth_one_without_momentum_is_delta_rule(package):
    memory = TitansConfig(depth=1, written_layers="last", inner_clip=None, residual=False)
    case = make_case(memory, "ssc", mask="some")
    coefficients = case.coefficients._replace(momentum=0 * case.coefficients.momentum)
    other = case.with_config(memory=DeltaConfig(), chunk_size=4)
    other = other._replace(coefficients=coefficients._replace(momentum=None))
    case = case._replace(coefficients=coefficients)
    assert_close(package.run(case, "recurrent").output, package.run(other).output, EXACT)


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("linear", "ssc", "restart"),
        ("delta", "soup", "checkpoint"),
        ("titans-last", "residual", "restart"),
        ("swla", "grm", "checkpoint"),
        ("dla", "soup", "restart"),
        ("titans", "residual", "restart"),
        ("titans", "ssc", "checkpoint"),
    ],
)
def test_outputs_are_causal(package, memory, aggregation, mode):
    """Changing token t inside a chunk leaves all earlier outputs bit-identical."""
    case, t = make_case(memory, aggregation, state_init_mode=mode, ssc_top_k=1), 7
    rng = np.random.default_rng(1)
    later = expand_mask(np.arange(13) >= t, np.empty((1, 13)))[None]
    other = case.map_inputs(
        lambda x: np.where(expand_mask(later, x), x * rng.uniform(0.2, 0.9, x.shape), x)
    )
    before, after = package.run(case), package.run(other)
    np.testing.assert_array_equal(before.output[:, :t], after.output[:, :t])
    np.testing.assert_array_equal(before.gates[:, :t], after.gates[:, :t])
    assert np.abs(np.asarray(before.output - after.output))[:, t:].max(axis=(0, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("memory", ["linear", "swla", *DEEP])
def test_reads_depend_on_query(package, memory):
    """A zero MLP memory would ignore the query (section 2)."""
    case = make_case(memory, "none", tokens=1)
    first, second = (
        package.run(case).output,
        package.run(case._replace(q=-case.q[:, :, ::-1])).output,
    )
    residual = case.q + case.q[:, :, ::-1] if case.v.shape == case.q.shape else 0.0
    for difference in (first - second, np.asarray(first - second) - residual):
        assert np.abs(np.asarray(difference)).max() > 1e-2


@pytest.mark.parametrize("memory", DEEP)
def test_write_decreases_inner_loss(package, memory):
    """Equations 30 and 34 with gradient descent: the read of k moves towards v."""
    case = make_case(memory, "none", tokens=1, batch=4)
    step = np.full((4, 1, 2), 0.02)
    coefficients = case.coefficients._replace(retention=np.ones_like(step))
    case = case._replace(q=case.k)
    losses = []
    for eta in (0.0 * step, step):
        y = np.asarray(
            package.run(case._replace(coefficients=coefficients._replace(step=eta))).output
        )
        dot = case.config.memory.objective == "dot"
        losses.append(-(y * case.v).sum(-1) if dot else ((y - case.v) ** 2).sum(-1))
    assert (losses[1] < losses[0]).all()


@pytest.mark.parametrize("memory", ["dla", "titans-norm"])
def test_inner_clip_bounds_writes(package, memory):
    """||W_t|| <= ||W_0|| + t·c·η/(1-β) for values of any size (section 2, bounded writes)."""
    case = make_case(memory, "none", tokens=12, segment_size=12)
    case = case._replace(v=1e6 * case.v)
    coefficients = case.coefficients._replace(retention=np.ones((2, 12, 2)))
    result = package.run(case._replace(coefficients=coefficients))
    momentum = 0.0 if coefficients.momentum is None else coefficients.momentum.max()
    bound = 12 * case.config.memory.inner_clip * coefficients.step.max() / (1 - momentum)
    for start, end in zip(case.initial, result.cache.state.weights, strict=True):
        norms = np.linalg.norm(np.asarray(end), axis=(-2, -1))
        assert (norms <= np.linalg.norm(start, axis=(-2, -1)) + bound).all()
        assert (norms > 0.01 * bound).any()


@pytest.mark.parametrize("memory", ["swla", "titans"])
def test_fully_masked_sequence_keeps_initial_state(package, memory):
    case = make_case(memory, "grm")._replace(mask=np.zeros((2, 13), bool))
    for method in ("chunked", "recurrent"):
        result = package.run(case, method)
        assert not np.asarray(result.output).any()
        assert not np.asarray(result.cache.segments.pool).any()
        assert not np.asarray(result.cache.length).any()
        for start, end in zip(case.initial, result.cache.state.weights, strict=True):
            np.testing.assert_array_equal(end, np.broadcast_to(start, end.shape))
