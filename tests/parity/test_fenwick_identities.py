"""Identities of `segmentation="fenwick"` (section 7), and its configuration.

PyTorch, which need not compile, checks all of them quickly; JAX, as slow tests.
"""

import warnings
from types import ModuleType

import numpy as np
import pytest

from helpers import jax_calls, torch_calls
from helpers.cases import AGGREGATIONS, MEMORIES, assert_close, make_case
from helpers.fenwick_cases import make_fenwick_case
from mc_core import LinearConfig, MCConfig, TitansConfig, make_plan

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10
METHODS = ("chunked", "recurrent")


@pytest.fixture(params=["torch", pytest.param("jax", marks=pytest.mark.slow)])
def package(request: pytest.FixtureRequest) -> ModuleType:
    """Helpers that run a case in one of the packages."""
    return {"jax": jax_calls, "torch": torch_calls}[request.param]


def without_decay(case):
    """Set retention to 1 and the initial memory to 0."""
    retention = np.ones_like(case.coefficients.retention)
    initial = tuple(np.zeros_like(w) for w in case.initial)
    return case._replace(
        initial=initial, coefficients=case.coefficients._replace(retention=retention)
    )


@pytest.mark.parametrize("memory", ["swla", "titans"])
@pytest.mark.parametrize("tokens", [3, 4, 7])
def test_first_block_equals_no_caching(package, memory, tokens):
    """With one block every aggregation is `none`; with two, the second reads the first."""
    none = package.run(make_case(memory, "none", tokens=tokens, segment_size=4))
    for i, aggregation in enumerate(AGGREGATIONS):
        case = make_fenwick_case(memory, aggregation, tokens=tokens, segment_size=4)
        result = package.run(case, METHODS[i % 2])
        assert_close(result.output[:, :4], none.output[:, :4], EXACT, name=aggregation)
        gates = np.asarray(result.gates)[:, :4]
        assert not gates[..., :-1].any()
        assert_close(gates[..., -1], np.ones_like(gates[..., -1]), EXACT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("memory", "tokens"), [("linear", 37), ("linear-elu", 16)])
def test_residual_with_restart_equals_undivided_linear_attention(package, memory, tokens, method):
    options = {"tokens": tokens, "segment_size": 3, "mask": "some", "state_init_mode": "restart"}
    case = without_decay(make_fenwick_case(memory, "residual", **options))
    undivided = case.with_config(aggregation="none", segmentation="constant", segment_size=tokens)
    assert_close(package.run(case, method).output, package.run(undivided).output, EXACT)


@pytest.mark.parametrize("memory", ["linear", "swla"])
def test_residual_with_restart_sums_the_states_of_constant_segments(package, memory):
    """Without decay; every block starts from the initial memory, which is not zero here."""
    options = {"tokens": 29, "segment_size": 3, "mask": "some", "state_init_mode": "restart"}
    case = make_fenwick_case(memory, "residual", **options)
    retention = np.ones_like(case.coefficients.retention)
    case = case._replace(coefficients=case.coefficients._replace(retention=retention))
    assert case.initial[0].any()
    constant = case.with_config(segmentation="constant")
    assert_close(package.run(case).output, package.run(constant).output, EXACT)


@pytest.mark.parametrize("gate", ["context", "token"])
def test_blocks_of_one_token_equal_log_linear_attention(package, gate):
    """The dense definition of section 7 with the gates in the place of λ: level 1 + e, online 0."""
    tokens = 19
    options = {"segment_size": 1, "state_init_mode": "restart", "gate": gate, "mask": "some"}
    case = without_decay(make_fenwick_case("linear", "grm", tokens=tokens, **options))
    step = np.ones_like(case.coefficients.step)
    case = case._replace(coefficients=case.coefficients._replace(step=step))
    result = package.run(case)
    gates = np.asarray(result.gates)
    weights = np.concatenate([gates[..., -1:], gates[..., :-1]], axis=-1)  # by level
    expected = np.zeros_like(case.v)
    for t in range(tokens):
        for s in range(t + 1):
            level = (t ^ s).bit_length()
            score = (case.q[:, t] * case.k[:, s]).sum(-1) * weights[:, t, :, level]
            expected[:, t] += np.where(case.mask[:, s, None], score, 0.0)[..., None] * case.v[:, s]
    assert_close(result.output, expected * case.mask[..., None, None], EXACT)


@pytest.mark.parametrize("memory", ["linear", "titans"])
def test_checkpoint_buckets_are_states_of_constant_segments(package, memory):
    """In `checkpoint` mode the bucket that ends with a segment is its cached memory."""
    options = {"tokens": 23, "segment_size": 3}
    fenwick = package.run(make_fenwick_case(memory, "grm", **options)).cache.segments
    constant = package.run(make_case(memory, "grm", **options)).cache.segments
    for ours, theirs in zip(fenwick.weights, constant.weights, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert_close(ours[:, [0, 1, 2]], theirs[:, [6, 5, 3]], EXACT)  # 7 blocks = 4 + 2 + 1
        assert not ours[:, 3:].any()


@pytest.mark.parametrize("method", METHODS)
def test_power_of_two_length_caches(package, method):
    result = package.run(make_fenwick_case("swla", "grm", tokens=16, segment_size=4), method)
    gates = np.asarray(result.gates)
    assert (gates[:, 12:, :, :2] > 0).all()
    assert (gates[:, 8:12, :, 1] > 0).all()
    assert not gates[..., 2].any()  # 4 blocks are complete only after the last token
    assert np.asarray(result.cache.segments.weights[0])[:, 2].any()
    assert not np.asarray(result.cache.segments.weights[0])[:, :2].any()


def test_masked_tokens_keep_their_position(package):
    """A masked block is still a block: buckets follow positions, not written tokens."""
    case = make_fenwick_case("linear", "grm", tokens=14, segment_size=2)
    mask = np.ones((2, 14), bool)
    mask[:, 2:8] = False
    for method in METHODS:
        result = package.run(case._replace(mask=mask), method)
        read = np.asarray(result.gates)[0, :, 0, :-1] > 0
        segments = [t // 2 if mask[0, t] else 0 for t in range(14)]
        expected = [[bool(s >> e & 1) for e in range(3)] for s in segments]
        assert read.tolist() == expected
        np.testing.assert_array_equal(np.asarray(result.cache.length), 2)


@pytest.mark.parametrize("memory", MEMORIES)
def test_restart_requires_decay_only_transitions(memory):
    config = MEMORIES[memory]
    options = {"segmentation": "fenwick", "state_init_mode": "restart"}
    if config.decay_only_transition:
        assert MCConfig(8, 2, config, **options).sums_states
        return
    message = "state_init_mode = 'restart': must be 'checkpoint' for fenwick segments of a"
    with pytest.raises(ValueError, match=f"{message} {config.kind} memory"):
        MCConfig(8, 2, config, **options)


def test_explicit_lengths_are_rejected(package):
    case = make_fenwick_case("linear", "grm", tokens=8)._replace(lengths=(4, 4))
    with pytest.raises(ValueError, match=r"segment_lengths = \[4, 4\]: must be None for"):
        package.run(case)


def test_log_linear_pp_is_grm_over_fenwick():
    config = MCConfig.log_linear_pp(16, 2, TitansConfig(), segment_size=32)
    expected = MCConfig(16, 2, TitansConfig(), "grm", segmentation="fenwick", segment_size=32)
    assert config == expected
    assert MCConfig.log_linear_pp(16, 2).memory == LinearConfig()


def test_logarithmic_warns_about_a_single_segment():
    config = MCConfig(8, 2, segmentation="logarithmic")
    with pytest.warns(UserWarning, match="64 tokens are one segment.* use 'fenwick'"):
        make_plan(64, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_plan(63, config)
        make_plan(1, config)
        make_plan(64, MCConfig(8, 2, aggregation="none", segmentation="logarithmic"))
