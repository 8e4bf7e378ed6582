"""Components of reads match explicit loops: gates, tiled dense reads, sparse dispatch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.cases import GATES, Array, assert_close
from mc_core import DLAConfig, LinearConfig, MCConfig, make_plan
from mc_core.config import NORM_EPS
from mc_core.dense_reads import count_pairs
from mc_jax.backends import make_memory
from mc_jax.backends.base import apply_weights, decay_products
from mc_jax.dense_reads import sum_earlier_reads
from mc_jax.gates import (
    compute_gates,
    dense_gates,
    gate_scores,
    level_score,
    pool_keys,
    scatter_gates,
    select_top_k,
)
from mc_jax.numerics import running_sum
from mc_jax.sparse_reads import ROW_BLOCK, _sort, read_selected

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-12


def layer(aggregation: str, **options: object) -> MCConfig:
    return MCConfig(8, 2, aggregation=aggregation, **options)


@pytest.mark.parametrize(
    "n", [pytest.param(n, marks=() if n in (2, 5, 8) else pytest.mark.slow) for n in range(2, 10)]
)
def test_tiled_reads_match_double_loop(n):
    """Section 6: every pair (segment, earlier memory) once, in values and gradients."""
    rng = np.random.default_rng(n)
    b, h, c, width = 2, 2, 3, 4
    x = rng.standard_normal((b, h, n, c, width))
    gates = rng.standard_normal((b, h, n, c, n))
    weights = rng.standard_normal((b, n, h, 5, width))

    def read(x: jax.Array, gate: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        y = jnp.sin(jnp.einsum("...oi,...ci->...co", weights[0], x))  # nonlinear in the pair
        return gate[..., None] * y

    def loop(x: jax.Array, gates: jax.Array, weights: jax.Array) -> jax.Array:
        values = jnp.sin(jnp.einsum("bmhoi,bhnci->bhncmo", weights, x))
        earlier = np.tril(np.ones((n, n)), -1)[None, None, :, None, :]
        return jnp.einsum("bhncm,bhncmo->bhnco", gates * earlier, values)

    def fast(x: jax.Array, gates: jax.Array, weights: jax.Array) -> jax.Array:
        return sum_earlier_reads(read, x, gates, (weights,))

    inputs = tuple(map(jnp.asarray, (x, gates, weights)))
    functions = [
        jax.jit(lambda *a, f=f: (y := jax.vjp(f, *a))[1](jnp.cos(y[0])) + (y[0],))
        for f in (fast, loop)
    ]
    actual, expected = (f(*inputs) for f in functions)
    assert_close(actual, expected, EXACT, name="triangle")
    assert not np.asarray(actual[-1])[:, :, 0].any()  # no memory before the first segment


def test_tiles_cover_about_half_of_the_square():
    """At least n(n-1)/2 pairs; at most 0.615 n² from 4 segments on."""
    for n in range(2, 200):
        pairs = count_pairs(n)
        assert pairs >= n * (n - 1) // 2
        if n >= 4:
            assert pairs <= 0.615 * n * n, f"{pairs} pairs of {n} segments: {pairs / n**2:.2f} n²"
        if n & (n - 1) == 0:
            assert pairs == n * (n - 1) // 2


@pytest.mark.parametrize("n", [2, 5, 8, 11])
def test_count_pairs_matches_reads(n):
    pairs: list[int] = []

    def read(x: jax.Array, gate: jax.Array, weights: tuple[jax.Array, ...]) -> jax.Array:
        squares, *_, rows, _ = x.shape
        jax.debug.callback(lambda: pairs.append(squares * rows))  # every time that it runs
        return gate[..., None] * x

    one = jnp.ones((1, 1, n, 1, n))
    memories = (jnp.ones((1, n, 1, 1, 1)),)
    total = jax.jit(lambda x: sum_earlier_reads(read, x, one, memories))(one[..., :1])
    jax.effects_barrier()
    assert sum(pairs) == count_pairs(n)
    np.testing.assert_array_equal(np.asarray(total).ravel(), np.arange(n))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_select_top_k_breaks_ties_by_earlier_segment(top_k):
    """Equation 16; n if fewer memories are cached."""
    score = jnp.asarray([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    allowed = jnp.asarray([[True, True, True, True], [True, True, False, False]])
    chosen = np.asarray(select_top_k(score, allowed, top_k))
    assert chosen.shape == (2, min(top_k, 4))
    assert chosen[0].tolist() == [1, 2, 0, 3][:top_k]
    assert chosen[1].tolist() == [0, 1, 4, 4][:top_k]


@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "soup", "ssc", "mean"])
def test_gates_match_loop(aggregation):
    """Equations 7, 9, 10 and 17: earlier cached segments and the online memory."""
    rng = np.random.default_rng(0)
    segment, n = np.array([0, 0, 1, 2, 3]), 4
    score = rng.standard_normal((2, 5, 3, n + 1))
    config = layer(aggregation, ssc_top_k=2)
    gates = dense_gates(jnp.asarray(score), jnp.asarray(segment), config)
    expected = np.zeros_like(score)
    for at in np.ndindex(2, 5, 3):
        reference = segment[at[1]]
        read = [*range(reference)] if aggregation != "none" else []
        if aggregation == "ssc":
            read = sorted(read, key=lambda i: -score[at][i])[:2]
        read.append(n)
        weight = np.exp(score[at][read]) if config.gated else np.ones(len(read))
        expected[at][read] = (
            weight if aggregation in ("none", "residual") else weight / weight.sum()
        )
    assert_close(gates, expected, EXACT)
    assert (np.asarray(gates)[expected == 0] == 0).all()
    if aggregation not in ("none", "residual"):
        assert_close(jnp.sum(gates, -1), np.ones((2, 5, 3)), EXACT, name="sum of gates")


def test_gates_are_finite_for_large_scores():
    score = jnp.full((1, 2, 1, 3), 1e300).at[..., 0].set(-1e300)
    gates = dense_gates(score, jnp.asarray([0, 2]), layer("grm"))
    assert_close(np.asarray(gates)[0, :, 0], np.array([[0, 0, 1.0], [0, 0.5, 0.5]]), EXACT)


@pytest.mark.parametrize("width", [1, 2, 5, 12])
def test_level_is_bit_length_of_age(width):
    u, age = jnp.arange(width), np.arange(-3, 2000)
    expected = [min(max(int(x), 0).bit_length(), width - 1) for x in age]
    assert level_score(u, jnp.asarray(age)).tolist() == expected


@pytest.mark.parametrize("gated_by", GATES)
@pytest.mark.parametrize("block", [pytest.param(512, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("top_k", [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 9)), 3])
def test_gates_of_selected_memories_match_dense_gates(top_k, block, gated_by, monkeypatch):
    """Sparse gates match `dense_gates`: values and gradients."""
    monkeypatch.setattr("mc_jax.gates.SCORE_BLOCK", block)
    rng = np.random.default_rng(top_k)
    b, t, h, k, n = 2, 7, 3, 4, 5
    config = layer("ssc", ssc_top_k=top_k, softmax_temperature=0.7, gate=gated_by)
    u, running = (jnp.asarray(x) for x in rng.standard_normal((2, b, t, h, k)))
    pools = jnp.asarray(rng.standard_normal((b, n, h, k))).at[:, 3].set(0.5).at[:, 1].set(0.5)
    segment = jnp.asarray([0, 1, 2, 3, 4, 4, 2])

    bias = jnp.asarray(rng.standard_normal(h))

    def fast(u, pools, running, bias):
        weights, selected = compute_gates(u, pools, running, segment, config, bias)
        assert weights.shape == (b, t, h, min(top_k, n) + 1)
        return scatter_gates(weights, selected, n)

    def dense(u, pools, running, bias):
        return dense_gates(gate_scores(u, pools, running, segment, config, bias), segment, config)

    args = (u, pools, running, bias)
    cotangent = jnp.asarray(rng.standard_normal((b, t, h, n + 1)))

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(f, args):
        value, pull = jax.vjp(f, *args)
        return value, pull(cotangent)

    actual, expected = (value_and_gradients(f, args) for f in (fast, dense))
    assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("gated_by", GATES)
def test_bias_is_added_to_online_score(gated_by):
    """Before the division by the temperature, and only for the online memory."""
    rng = np.random.default_rng(0)
    u, running, pools = map(jnp.asarray, rng.standard_normal((3, 2, 5, 3, 4)))
    bias, segment = rng.standard_normal(3), jnp.asarray([0, 1, 2, 3, 4])
    config = layer("grm", softmax_temperature=0.3, gate=gated_by)
    args = u, pools, running, segment, config
    expected = np.array(gate_scores(*args))
    expected[..., -1] += bias / 0.3
    assert_close(gate_scores(*args, jnp.asarray(bias)), expected, EXACT)


@pytest.mark.parametrize("pool_norm", ["none", "l2"])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_pools_match_loop(pooling, pool_norm):
    """Section 4: pools of unmasked keys, 0 if none; running pools of the online segment."""
    rng = np.random.default_rng(0)
    lengths, k = (3, 1, 5), rng.standard_normal((2, 9, 2, 4))
    mask = rng.random((2, 9)) < 0.6
    mask[0, 3] = False
    plan = make_plan(9, layer("grm"), lengths)
    zeroed = np.where(mask[:, :, None, None], k, 0.0)
    config = layer("grm", pooling=pooling, pool_norm=pool_norm)
    pools = pool_keys(jnp.asarray(zeroed), jnp.asarray(mask), plan, config)
    for b, t in np.ndindex(2, 9):
        first = sum(lengths[: plan.segment_of[t]])
        real = np.flatnonzero(mask[b, first : t + 1]) + first
        total = k[b, real].sum(0)
        mean = total / max(len(real), 1)
        expected = mean if pooling == "mean" else total
        if pool_norm == "l2":
            squares = np.sum(expected**2, axis=-1, keepdims=True)
            expected = expected / np.sqrt(squares + NORM_EPS)
        assert_close(pools.running[b, t], expected, EXACT)
        if t + 1 in plan.ends:
            assert_close(pools.segment[b, plan.segment_of[t]], expected, EXACT)
            assert_close(pools.total[b, plan.segment_of[t]], total, EXACT)
            assert pools.length[b, plan.segment_of[t]] == len(real)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200, 4097])
def test_running_sum_matches_cumsum(tokens):
    x = np.random.default_rng(0).standard_normal((2, tokens, 3))
    assert_close(running_sum(jnp.asarray(x)), x.cumsum(1), EXACT)


def test_decay_products_match_loop():
    """Section 6: a(t, i), the product over i+1..t; 0 for i > t; also with zero factors."""
    x = np.array([0.5, 0.9, 1e-30, 0.3, 1.0])
    for factors in (x, np.where(x < 1e-9, 0.0, x)):
        expected = np.zeros((5, 6))
        for t, i in np.ndindex(5, 6):
            if i <= t + 1:
                expected[t, i] = np.prod(factors[i : t + 1])
        assert_close(decay_products(jnp.asarray(factors)), expected, EXACT, floor=1e-12)


def gathered(memory: object, weights: tuple[Array, ...], q: Array, selected: Array) -> Array:
    """Read every (token, slot) from a gathered copy of its selected memory."""
    b, t, h, top_k = selected.shape
    n = weights[0].shape[1]
    out = np.zeros((b, t, h, top_k, weights[-1].shape[-2]))
    for at in np.ndindex(b, t, h, top_k):
        if selected[at] < n:
            reference = tuple(jnp.asarray(w[at[0], selected[at], at[2]])[None] for w in weights)
            x = jnp.asarray(q[at[:3]])[None, None]
            out[at] = memory.read(apply_weights(reference, x.dtype), x)[0, 0]
    return out


@pytest.mark.parametrize("kind", ["linear", "dla"])
def test_selected_reads_match_gather(kind, monkeypatch):
    """Section 6, `ssc`: blocks of 4 rows with empty, full and partial groups, and empty slots."""
    monkeypatch.setattr("mc_jax.sparse_reads.ROW_BLOCK", 4)
    memory = make_memory(LinearConfig() if kind == "linear" else DLAConfig(expansion=2))
    rng = np.random.default_rng(0)
    b, t, h, top_k, n, k = 2, 11, 2, 2, 5, 4
    shapes = [(b, n, h, k, k)] if kind == "linear" else [(b, n, h, 8, k), (b, n, h, k, 8)]
    weights = tuple(rng.standard_normal(s) for s in shapes)
    q = rng.standard_normal((b, t, h, k))
    selected = rng.integers(0, n + 1, (b, t, h, top_k))
    selected[0, :, 0] = 3  # one memory has all rows
    selected[1, :, 1] = n  # nothing selected
    read = jax.jit(lambda w, q, s: read_selected(memory, w, q, s))
    y = read(tuple(map(jnp.asarray, weights)), jnp.asarray(q), jnp.asarray(selected))
    assert_close(y, gathered(memory, weights, q, selected), EXACT)
    assert not np.asarray(y)[selected == n].any()


@pytest.mark.parametrize("n", [5, 2**28])
def test_sort_by_memory_is_stable(n):
    """Section 6, `ssc`: equals NumPy's stable sort, with and without combined keys."""
    group = np.random.default_rng(0).integers(0, 6, 37).astype(np.int32)
    group[group == 5] = n
    memory, row = _sort(jnp.asarray(group), n)
    expected = np.argsort(group, kind="stable")
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(memory, group[expected])


def rows_read(t: int, n: int, top_k: int) -> int:
    """Count the rows that `read_selected` passes to the memory."""
    row_counts: list[int] = []

    class Probe:
        def read(self, apply: object, x: jax.Array) -> jax.Array:
            row_counts.append(x.size // x.shape[-1])
            return x

    def trace(w: jax.Array, q: jax.Array, s: jax.Array) -> jax.Array:
        return read_selected(Probe(), (w,), q, s)

    jax.eval_shape(
        trace,
        jax.ShapeDtypeStruct((1, n, 1, 2, 2), jnp.float32),
        jax.ShapeDtypeStruct((1, t, 1, 2), jnp.float32),
        jax.ShapeDtypeStruct((1, t, 1, top_k), jnp.int32),
    )
    return row_counts[0]


def test_sparse_flops_are_independent_of_number_of_memories():
    """Section 6: t · top_k rows, and at most one padded block per memory."""
    for t, n, top_k in ((256, 4, 2), (1024, 16, 2), (4096, 64, 2), (4096, 64, 1), (4096, 16, 4)):
        rows = rows_read(t, n, top_k)
        assert t * top_k <= rows <= t * top_k + (n + 1) * ROW_BLOCK
    assert rows_read(8192, 128, 2) == 2 * rows_read(4096, 64, 2)  # N doubled as well
    assert rows_read(4096, 64, 2) < 0.1 * 4096 * 64
