"""The oracle matches finite differences, hand computations and exact identities."""

from typing import Any

import numpy as np
import pytest

from helpers.oracle_cases import Array, Coefficients, OracleCase, close, make_case
from helpers.oracle_mlp import inner_gradient, mlp
from mc_core import DLAConfig, LinearConfig, MCConfig, SWLAConfig, TitansConfig
from oracle import OracleResult, lengths_of

MEMORIES = {
    "linear": LinearConfig(),
    "linear-elu": LinearConfig(feature_map="elu+1"),
    "linear-normalized": LinearConfig(feature_map="elu+1", normalize=True),
    "swla": SWLAConfig(),
    "dla": DLAConfig(expansion=2),
    "dla-l2-deep": DLAConfig(depth=3, expansion=1, objective="l2", residual=False),
    "titans": TitansConfig(expansion=2),
    "titans-layer-norm": TitansConfig(depth=1, norm="layer", inner_clip=0.5),
}
every_memory = pytest.mark.parametrize("name", MEMORIES)
every_mode = pytest.mark.parametrize("mode", ["checkpoint", "restart"])


def single(values: Any) -> Array:
    """Add batch and head axes of size 1."""
    return np.asarray(values, np.float64)[None, :, None]


def same(a: OracleResult, b: OracleResult) -> None:
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        for left, right in zip(x, y, strict=True) if x is not None else ():
            np.testing.assert_array_equal(left, right, err_msg=name)


def test_inner_clip_uses_unscaled_gradient_per_layer():
    """The unclipped δ is backpropagated to the layer below."""
    case = make_case(DLAConfig(expansion=2, inner_clip=0.5), tokens=1)
    case = case._replace(initial=(case.initial[0], 0.02 * case.initial[1]), v=1000.0 * case.v)
    weights = [w[1] for w in case.initial]
    pairs = inner_gradient(weights, case.k[0, 0, 1], case.v[0, 0, 1], case.memory)
    step, retention, *_ = (c[0, 0, 1] for c in case.coefficients)
    result = case.run()
    for before, after, (delta, activation) in zip(weights, result.states, pairs, strict=True):
        gradient = np.outer(delta, activation)
        assert np.linalg.norm(gradient) > 1.0
        change = 0.5 * gradient / np.linalg.norm(gradient)
        close(after[0, 0, 1], retention * before - step * change, 1e-9)


def test_linear_matches_hand_computation():
    q, k, v = single([[1, 1], [2, -1]]), single([[1, 2], [3, 0]]), single([[5], [7]])
    coefficients = Coefficients(step=single([2, 3]), retention=single([0.5, 0.1]))
    case = OracleCase(q, k, v, None, (single([[1, -1]])[0],), coefficients, LinearConfig(), None)
    result = case.run("none")
    # W_1 = 0.5 (1, -1) + 2·5 (1, 2) = (10.5, 19.5); W_2 = 0.1 W_1 + 3·7 (3, 0) = (64.05, 1.95)
    close(result.output.ravel(), [10.5 + 19.5, 2 * 64.05 - 1.95])
    close(result.states[0].ravel(), [64.05, 1.95])
    assert result[-2:] == (None, None)  # neither normalizer nor momentum
    close(case._replace(coefficients=Coefficients()).run("none").states[0].ravel(), [27, 9])


def test_normalized_linear_read_is_weighted_average():
    """Equation 2, for a single memory, residual caching and a soup."""
    case = make_case(MEMORIES["linear-normalized"], tokens=4, batch=1, heads=1)
    coefficients = Coefficients(retention=single([0.5, 0.5, 0.5, 1.0]))
    case = case._replace(initial=(np.zeros((1, 4, 4)),), coefficients=coefficients)
    q, k, v = (x[0, :, 0] for x in (case.q, case.k, case.v))
    phi = lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))  # noqa: E731
    kept = np.array([0.25, 0.5, 1.0, 1.0])[:, None] * phi(k)  # also in each segment
    similar = kept @ phi(q[3])  # [t]
    whole, soup, residual = (
        case.run(a, state_init_mode="restart", segment_size=size)
        for a, size in (("none", 4), ("soup", 3), ("residual", 3))
    )
    close(whole.output[0, 3, 0], similar @ v / similar.sum())
    close(residual.output[0, 3, 0], similar[:3] @ v[:3] / similar[:3].sum() + v[3])
    mixed = similar * np.repeat(soup.gates[0, 3, 0, [0, 2]], [3, 1])
    close(soup.output[0, 3, 0], mixed @ v / mixed.sum())
    close(soup.normalizers[0, :, 0], [kept[:3].sum(0), kept[3]])
    faint = case._replace(coefficients=coefficients._replace(step=np.full((1, 4, 1), 1e-9)))
    close(faint.run("none").output[0, 3, 0], 1e-9 * similar @ v / 1e-6)  # at the floor


def test_swla_matches_hand_computation():
    k, v = single([[1, 0], [0, 1], [1, 1]]), single([[1], [2], [3]])
    coefficients = Coefficients(single([1, 2, 3]), single([0.5] * 3), None, single([9, 0.1, 0.2]))
    case = OracleCase(k, k, v, None, (single([[4, 8]])[0],), coefficients, SWLAConfig(), None)
    # W_1 = (2, 4) + 1·1 (1, 0): no previous token
    # W_2 = (1.5, 2) + 0.1·1 (1, 0) + 2·2 (0, 1) = (1.6, 6)
    # W_3 = (0.8, 3) + 0.2·2 (0, 1) + 3·3 (1, 1) = (9.8, 12.4)
    close(case.run("none").states[0].ravel(), [9.8, 12.4])
    close(case.run("none").output.ravel(), [3.0, 6.0, 9.8 + 12.4])
    close(case.run("none", segment_size=2).states[0].ravel(), [1.6, 6.0, 9.8, 12.4])
    anchored = case.run("none", state_init_mode="restart", segment_size=2)
    close(anchored.states[0].ravel(), [1.6, 6.0, 2.0 + 9.0, 4.0 + 9.0])
    masked = case.run("none", mask=np.array([[True, False, True]]))
    # W_3 = (1.5, 2) + 0.2·1 (1, 0) + 3·3 (1, 1): the masked token is not the previous one
    close(masked.states[0].ravel(), [1.5 + 0.2 + 9.0, 2.0 + 9.0])


@pytest.mark.parametrize(("chunk_size", "starts"), [(1, range(7)), (2, (0, 2, 3, 5))])
def test_depth_one_titans_is_delta_rule_with_momentum(chunk_size, starts):
    """Equations 34 and 35 with gradient descent, over two segments that share the momentum.

    Chunks restart at a segment's first token; masked tokens take positions.
    """
    case = make_case(TitansConfig(depth=1, residual=False, inner_clip=None), tokens=7)
    mask = np.array([[True] * 7, [True] * 4 + [False] + [True] * 2])
    result = case.run("none", mask=mask, segment_lengths=(3, 4), chunk_size=chunk_size)
    for b, h in np.ndindex(2, 2):
        w, s = case.initial[0][h], 0.0
        for t in range(7):
            if t in starts:
                anchor = w
            if mask[b, t]:
                k, v = case.k[b, t, h], case.v[b, t, h]
                eta, alpha, beta, _ = (c[b, t, h] for c in case.coefficients)
                s = beta * s - eta * 2 * np.outer(anchor @ k - v, k)
                w = alpha * w + s
                close(result.output[b, t, h], w @ case.q[b, t, h], 1e-10)
        close(result.momentum[0][b, h], s, 1e-10)


def test_depth_one_dla_with_dot_loss_is_linear_attention():
    case = make_case(DLAConfig(depth=1, residual=False, inner_clip=None))
    close(case.run().output, case._replace(memory=LinearConfig()).run().output)


@every_memory
def test_chunk_size_only_affects_gradients_that_use_weights(name):
    case = make_case(MEMORIES[name])
    apart = np.abs(case.run(chunk_size=4, segment_size=8).output - case.run(segment_size=8).output)
    assert (apart.max() > 1e-6) == (case.memory.kind in ("dla", "titans"))


def test_segment_lengths():
    constant = MCConfig(8, 2, segment_size=3)
    logarithmic = MCConfig(8, 2, segmentation="logarithmic")
    assert lengths_of(37, logarithmic) == [32, 4, 1]
    assert lengths_of(32, logarithmic) == [32]
    assert lengths_of(8, constant) == [3, 3, 2]
    assert lengths_of(8, constant, (1, 7)) == [1, 7]
    for wrong in ((1, 6), (0, 8)):
        with pytest.raises(ValueError, match="cover 8 tokens"):
            lengths_of(8, constant, wrong)


@every_memory
@every_mode
def test_segment_initial_state(name, mode):
    """`restart` equals a run of the segment alone, `checkpoint` an undivided run."""
    case = make_case(MEMORIES[name])
    parts = case.run("none", state_init_mode=mode)
    for i, (begin, end) in enumerate([(0, 3), (3, 6), (6, 8)]):
        part = slice(begin if mode == "restart" else 0, end)
        alone = case.map_inputs(lambda x: x[:, part]).run("none", segment_size=8)  # noqa: B023
        for left, right in zip(parts.states, alone.states, strict=True):
            close(left[:, i], right[:, 0])
        close(parts.output[:, end - 1], alone.output[:, -1])


@every_memory
@every_mode
@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc", "residual", "mean"])
def test_masked_token_does_not_change_state(name, mode, aggregation):
    case, gone = make_case(MEMORIES[name]), [1, 3, 6]
    mask = ~np.isin(np.arange(8), gone)[None].repeat(2, 0)
    spoilt = case.map_inputs(lambda x: np.where(mask.reshape(2, 8, *[1] * (x.ndim - 2)), x, np.nan))
    result = spoilt.run(aggregation, state_init_mode=mode, mask=mask)
    assert not result.output[:, gone].any()
    assert not result.gates[:, gone].any()
    without = case.map_inputs(lambda x: np.delete(x, gone, 1))
    without = without.run(aggregation, state_init_mode=mode, segment_lengths=(2, 2, 1))
    output, gates = (np.delete(x, gone, 1) for x in (result.output, result.gates))
    same(result._replace(output=output, gates=gates), without)


def test_batch_and_heads_are_independent():
    case = make_case(MEMORIES["titans-layer-norm"])
    alone = case._replace(initial=(case.initial[0][1:],), norm=tuple(x[1:] for x in case.norm))
    whole, alone = case.run(), alone.map_inputs(lambda x: x[1:, :, 1:]).run()
    for left, right, shape in (
        (whole.output, alone.output, (2, 8, 2, 4)),
        (whole.gates, alone.gates, (2, 8, 2, 4)),
        (whole.states[0], alone.states[0], (2, 3, 2, 4, 4)),
        (whole.pools, alone.pools, (2, 3, 2, 4)),
        (whole.momentum[0][:, None], alone.momentum[0][:, None], (2, 1, 2, 4, 4)),
    ):
        assert left.shape == shape
        close(left[1:, :, 1:], right)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_gates_and_reads_match_hand_computation(pooling):
    """Equations 9, 10 and 15 at the last token, whose online memory is the final state."""
    case = make_case(DLAConfig(expansion=2))
    mask = np.isin(np.arange(8), [0, 2, 6, 7])[None].repeat(2, 0)
    options = {"pooling": pooling, "softmax_temperature": 0.3, "mask": mask}
    grm, soup = case.run("grm", **options), case.run("soup", **options)
    none, residual = case.run("none", **options), case.run("residual", **options)
    for b, h in np.ndindex(2, 2):
        key, u, q = case.k[b, :, h], case.u[b, 7, h], case.q[b, 7, h]
        pools = np.array([key[0] + key[2], 0 * key[0], key[6] + key[7]])
        pools = pools / [[2.0], [1.0], [2.0]] if pooling == "mean" else pools
        gates = np.exp(pools @ u / 0.3) / np.exp(pools @ u / 0.3).sum()
        states = [[w[b, i, h] for w in grm.states] for i in range(3)]
        reads = np.array([mlp(state, q, case.memory)[0] for state in states])
        mixed = [np.tensordot(gates, np.stack(layer), 1) for layer in zip(*states, strict=True)]
        close(grm.pools[b, :, h], pools)
        close(grm.gates[b, 7, h], [*gates[:2], 0.0, gates[2]])
        close(grm.gates[b, 0, h], [0.0, 0.0, 0.0, 1.0])
        expected = (gates @ reads, mlp(mixed, q, case.memory)[0], reads[2], reads.sum(0))
        for result, y in zip((grm, soup, none, residual), expected, strict=True):
            close(result.output[b, 7, h], y)
    assert np.abs(grm.output - soup.output).max() > 1e-4
    close(none.gates[0, 7, 0], [0, 0, 0, 1])
    close(residual.gates[0, 7, 0], [1, 1, 0, 1])


@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
@pytest.mark.parametrize("temperature", [0.3, "learned"])
def test_gate_options_match_hand_computation(aggregation, temperature):
    """Bias of the online memory, temperature per head, pooled keys of unit norm."""
    case, bias, learned = make_case(LinearConfig()), np.array([0.5, -2.0]), np.array([2.0, 0.7])
    options = {"pool_norm": "l2", "softmax_temperature": temperature, "gate_bias": bias}
    options["temperature"] = learned if temperature == "learned" else None
    result = case.run(aggregation, ssc_top_k=1, **options)
    for b, h in np.ndindex(2, 2):
        key, u = case.k[b, :, h], case.u[b, 7, h]
        pools = np.array([key[:3].mean(0), key[3:6].mean(0), key[6:].mean(0)])
        pools /= np.sqrt((pools**2).sum(-1, keepdims=True) + 1e-6)
        scores = (pools @ u + [0.0, 0.0, bias[h]]) / (
            learned[h] if temperature == "learned" else 0.3
        )
        if aggregation == "ssc":
            scores[np.argmin(scores[:2])] = -np.inf
        gates = np.exp(scores) / np.exp(scores).sum()
        close(result.pools[b, :, h], pools)
        close(result.gates[b, 7, h], [*gates[:2], 0.0, gates[2]])


@every_memory
@every_mode
@pytest.mark.parametrize("aggregation", ["residual", "grm", "soup", "ssc", "mean"])
def test_single_segment_equals_no_caching(name, mode, aggregation):
    case = make_case(MEMORIES[name])
    result = case.run(aggregation, state_init_mode=mode, segment_size=8)
    close(result.output, case.run("none", state_init_mode=mode, segment_size=8).output)
    close(result.gates[..., 1], 1.0)


@pytest.mark.parametrize("name", ["linear", "linear-elu", "swla"])
@every_mode
def test_soup_equals_grm_for_matrix_memories(name, mode):
    case = make_case(MEMORIES[name])
    close(case.run(state_init_mode=mode).output, case.run("soup", state_init_mode=mode).output)


@pytest.mark.parametrize("name", ["linear", "linear-elu"])
def test_residual_with_restart_equals_undivided_linear_attention(name):
    """Equation 7 without decay, from zero."""
    case = make_case(MEMORIES[name])
    steps = Coefficients(case.coefficients.step)
    case = case._replace(initial=(np.zeros((2, 4, 4)),), coefficients=steps)
    cached = case.run("residual", state_init_mode="restart")
    close(cached.output, case.run("none", segment_size=8).output)


@every_memory
@every_mode
def test_identities_of_grm(name, mode):
    """`grm` equals `ssc` with all segments selected, and `mean` with a zero connector."""
    case, start = make_case(MEMORIES[name]), {"state_init_mode": mode}
    same(case.run("ssc", ssc_top_k=9, **start), case.run(**start))
    mean = case._replace(u=None).run("mean", **start)
    grm = case._replace(u=np.zeros_like(case.u)).run(**start)
    close(grm.output, mean.output)
    close(grm.gates, mean.gates)
    close(mean.gates[0, 7, 0], [1 / 3, 1 / 3, 0, 1 / 3])


def test_ssc_selects_highest_scores_with_ties_to_earlier_segment():
    """Equations 16 and 17, with scores 1, 2, 2, 0 of four cached segments and 5 online."""
    k, v = single([[1], [2], [2], [0], [5]]), single([[1], [10], [100], [1000], [10000]])
    ones = np.ones_like(k)
    case = OracleCase(
        ones, k, v, ones, (np.zeros((1, 1, 1)),), Coefficients(), LinearConfig(), None
    )
    reads = np.array([1, 20, 200, 0, 50000])
    for top_k, chosen in ((1, [1, 4]), (2, [1, 2, 4]), (3, [0, 1, 2, 4]), (4, [0, 1, 2, 3, 4])):
        result = case.run("ssc", ssc_top_k=top_k, segment_size=1, state_init_mode="restart")
        gates = np.zeros(5)
        gates[chosen] = np.exp(k[0, chosen, 0, 0])
        gates /= gates.sum()
        close(result.gates[0, 4, 0], [*gates[:4], 0.0, gates[4]])
        close(result.output[0, 4, 0, 0], gates @ reads)


def test_token_gates_match_hand_computation():
    """Cached memories of ages 4 to 1 and the online one; heads of width 3 have levels 0 to 2."""
    case = make_case(LinearConfig(), tokens=5)
    for width, order in ((4, [3, 2, 2, 1, 0]), (3, [2, 2, 2, 1, 0])):
        u = case.u[..., :width]
        short = case._replace(q=case.q[..., :width], k=case.k[..., :width], u=u)
        short = short._replace(initial=(case.initial[0][..., :width],))
        options = {"segment_size": 1, "gate": "token", "softmax_temperature": 0.3}
        gates = short.run(**options).gates[:, 4]
        expected = np.exp(u[:, 4][..., order] / 0.3)
        expected /= expected.sum(-1, keepdims=True)
        close(gates[..., :4], expected[..., :4])
        close(gates[..., 5], expected[..., 4])
        sparse = short.run("ssc", ssc_top_k=1, **options).gates[0, 4, 0, :4]
        assert np.flatnonzero(sparse).tolist() == [np.argmax(u[0, 4, 0, order[:4]])]


def test_query_as_connector():
    case = make_case(LinearConfig())
    same(case.run(use_q_as_u=True), case.run())
    same(case._replace(u=None).run(use_q_as_u=True), case._replace(u=case.q).run())
    with pytest.raises(ValueError, match="needs u"):
        case._replace(u=None).run()


@every_memory
@every_mode
@pytest.mark.parametrize("aggregation", ["grm", "ssc", "soup"])
def test_outputs_are_causal(name, mode, aggregation):
    case, halves = make_case(MEMORIES[name]), np.where(np.arange(8) >= 4, 0.5, 1.0)
    changed = case.map_inputs(lambda x: x * halves.reshape(8, *[1] * (x.ndim - 2)))
    options = {"state_init_mode": mode, "chunk_size": 2, "ssc_top_k": 1}
    before, after = (x.run(aggregation, **options) for x in (case, changed))
    np.testing.assert_array_equal(before.output[:, :4], after.output[:, :4])
    np.testing.assert_array_equal(before.gates[:, :4], after.gates[:, :4])
    assert np.abs(before.output - after.output)[:, 4:].max() > 0.01
