"""Statistics of `inspect` match the oracle in both frameworks."""

from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
import oracle
from helpers import jax_calls, torch_calls
from helpers.cases import (
    KINDS,
    MASKS,
    MEMORIES,
    MODES,
    Array,
    FunctionCase,
    assert_close,
    make_case,
    make_mask,
)
from helpers.layer_oracle import CONFIGS, layer_oracle, make_layer, parameters
from helpers.oracle_mlp import inner_loss
from mc_core import LinearConfig, MCConfig
from mc_core.segmentation import make_plan as jax_plan
from mc_torch.chunk_layout import make_plan as torch_plan

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT = 1e-10


def oracle_statistics(case: FunctionCase) -> mc_jax.InnerLoop:
    """Run the oracle, and compute the statistics of the writes from its states."""
    config, (b, t, h, _) = case.config, case.q.shape
    memory, titans = config.memory, config.memory.kind == "titans"
    lengths = oracle.lengths_of(t, config, case.lengths)
    statistics, segments = np.zeros((5, b, t, h)), np.zeros((3, b, len(lengths), h))
    dead = np.zeros((b, h), bool)

    def tensors(state: oracle.State) -> list[Array]:
        normalizer = state.memory.normalizer
        weights = state.memory.weights[memory.fixed_layers :]
        return [*weights, *([] if normalizer is None else [normalizer])]

    def norm(arrays: Any) -> float:
        return float(np.sqrt(sum((x**2).sum() for x in arrays)))

    for row, head in product(range(b), range(h)):
        gain = None if case.norm is None else tuple(x[head] for x in case.norm)

        def loss(state: oracle.State, k: Array, v: Array, gain: Any = gain) -> float:
            if memory.kind in ("dla", "titans"):
                return inner_loss(state.memory.weights, k, v, memory, gain)
            x = oracle.feature(k, memory) if memory.kind == "linear" else k
            y = state.memory.weights[0] @ x
            return float((y - v) @ (y - v) if memory.has_l2_loss else -y @ v)

        start = oracle.start(tuple(w[head] for w in case.initial), memory)
        state, token = start, 0
        ends = oracle.chunk_ends(lengths, config)
        for segment, length in enumerate(lengths):
            state = start if config.state_init_mode == "restart" else state
            first = state
            for place in range(length):
                if place % config.chunk_size == 0:
                    anchor, decay = state.memory.weights, 1.0
                before, k, v = state, case.k[row, token, head], case.v[row, token, head]
                if case.mask is None or case.mask[row, token]:
                    at = case.coefficients._asdict()
                    at = {n: x[row, token, head] for n, x in at.items() if x is not None}
                    state = oracle.write(state, anchor, k, v, oracle.Write(**at), memory, gain)
                    decay *= at["retention"]
                    losses = loss(before, k, v), loss(state, k, v)
                    statistics[3:, row, token, head] = losses
                pairs = zip(tensors(state), tensors(before), strict=True)
                norms = (
                    norm(tensors(state)),
                    norm(state.momentum or ()),
                    norm(x - y for x, y in pairs),
                )
                statistics[:3, row, token, head] = norms
                if token in ends:
                    state = oracle.end_chunk(state, anchor, decay, memory)
                token += 1
            tokens = [
                (case.k[row, i, head], case.v[row, i, head])
                for i in range(token - length, token)
                if case.mask is None or case.mask[row, i]
            ]
            if tokens:
                means = [np.mean([loss(at, k, v) for k, v in tokens]) for at in (first, state)]
                scale = means[0] if memory.has_l2_loss else np.mean([v @ v for _, v in tokens])
                segments[:, row, segment, head] = *means, scale
        written = np.flatnonzero(np.ones(t) if case.mask is None else case.mask[row])
        late = statistics[2, row, written[len(written) // 2 :], head]
        dead[row, head] = late.max(initial=0) <= 1e-3 * norm(tensors(start))
    momentum_norm = statistics[1] if titans else None
    return mc_jax.InnerLoop(statistics[0], momentum_norm, *statistics[2:], *segments, dead)


@partial(jax.jit, static_argnames=("config", "lengths"))
def inspect_jax(
    inputs: dict[str, Any], mask: jax.Array | None, config: MCConfig, lengths: Any
) -> Any:
    result = mc_jax.memory_caching(
        **inputs, config=config, mask=mask, segment_lengths=lengths, inspect=True
    )
    plan = jax_plan(result.gates.shape[1], config, lengths)
    return mc_jax.inspection.make_trace(result.gates, result.cache.segments, result.inner, plan)


def jax_trace(case: FunctionCase, dtype: Any = jnp.float64) -> mc_jax.Trace:
    mask = None if case.mask is None else jnp.asarray(case.mask)
    return inspect_jax(jax_calls.arrays(case, dtype), mask, case.config, case.lengths)


def torch_trace(case: FunctionCase, dtype: torch.dtype = torch.float64) -> mc_torch.Trace:
    mask = None if case.mask is None else torch.tensor(case.mask)
    result = mc_torch.memory_caching(
        **torch_calls.arrays(case, dtype),
        config=case.config,
        mask=mask,
        segment_lengths=case.lengths,
        inspect=True,
    )
    assert not any(x.requires_grad for x in torch_calls.leaves(result.inner))
    plan = torch_plan(case.tokens, case.config, case.lengths, torch.device("cpu"))
    return mc_torch.inspection.make_trace(result.gates, result.cache.segments, result.inner, plan)


def jax_inner(case: FunctionCase, dtype: Any = jnp.float64) -> mc_jax.InnerLoop:
    return inner_loop(jax_trace(case, dtype))


def torch_inner(case: FunctionCase, dtype: torch.dtype = torch.float64) -> mc_jax.InnerLoop:
    return inner_loop(torch_trace(case, dtype))


def inner_loop(trace: Any) -> mc_jax.InnerLoop:
    return mc_jax.InnerLoop(*(getattr(trace, field) for field in mc_jax.InnerLoop._fields))


FRAMEWORKS = pytest.mark.parametrize(
    ("inspect", "float32"), [(jax_inner, jnp.float32), (torch_inner, torch.float32)],
    ids=["jax", "torch"],
)  # fmt: skip
# Variants of the same kind repeat these, and are slow tests.
QUICK = {
    "linear-normalized",
    "swla",
    "dla-initial",
    "dla-deep",
    "titans-norm",
    "titans-orthogonal",
    "delta",
    "titans-last-initial",
}
TRACES = pytest.mark.parametrize("trace", [jax_trace, torch_trace], ids=["jax", "torch"])


@pytest.mark.parametrize(
    "memory", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MEMORIES]
)
def test_torch_inspection_matches_oracle(memory):
    for mode, mask, chunk in product(MODES, MASKS, (1, 3, 5)):
        case = make_case(memory, "none", mask=mask, state_init_mode=mode, chunk_size=chunk)
        assert_close(
            torch_inner(case), oracle_statistics(case), EXACT, name=f"{mode} {mask} {chunk}"
        )


# Every memory once, with different modes, masks and chunks.
@pytest.mark.parametrize(
    ("memory", "mode", "mask", "chunk"),
    [
        pytest.param(
            memory,
            MODES[i % 2],
            MASKS[1 + i % 4],
            (1, 3, 5)[i % 3],
            marks=() if memory in QUICK else pytest.mark.slow,
        )
        for i, memory in enumerate(MEMORIES)
    ],
)
def test_jax_inspection_matches_oracle(memory, mode, mask, chunk):
    case = make_case(memory, "none", mask=mask, state_init_mode=mode, chunk_size=chunk)
    assert_close(jax_inner(case), oracle_statistics(case), EXACT)


@FRAMEWORKS
@pytest.mark.parametrize(
    ("memory", "mode", "options"),
    [
        ("titans-norm", "checkpoint", {"segmentation": "logarithmic"}),
        pytest.param(
            "linear-normalized",
            "restart",
            {"segmentation": "logarithmic"},
            marks=pytest.mark.slow,
        ),
        ("dla-deep", "restart", {"lengths": (2, 7, 1, 3)}),
    ],
)
def test_statistics_of_segments_of_different_lengths(inspect, float32, memory, mode, options):
    case = make_case(memory, "none", mask="some", state_init_mode=mode, **options)
    assert_close(inspect(case), oracle_statistics(case), EXACT)


@TRACES
def test_recall_of_orthonormal_keys_is_one(trace):
    """A plain linear memory reads such keys exactly, at any norm of the values."""
    case = make_case("linear", "grm", tokens=8)
    ones, keys = np.ones_like(case.coefficients.step), np.tile(np.eye(4), (2, 1))
    case = case._replace(
        k=np.broadcast_to(keys[:, None], case.k.shape),
        initial=(np.zeros_like(case.initial[0]),),
        coefficients=case.coefficients._replace(step=ones, retention=ones),
        mask=np.arange(8) < [[8], [4]],
    )
    found = np.asarray(trace(case.with_config(state_init_mode="restart")).recall)
    np.testing.assert_allclose(found[0], 1)
    np.testing.assert_allclose(found[1], [[1, 1], [0, 0]])  # its second segment is masked
    # From a checkpoint, the second segment adds its values to those of the same keys.
    np.testing.assert_allclose(np.asarray(trace(case).recall), found)


@TRACES
@pytest.mark.parametrize("memory", [pytest.param("titans", marks=pytest.mark.slow), "dla-deep"])
def test_recall_of_an_l2_loss_is_the_share_that_is_removed(trace, memory):
    case = make_case(memory, "grm", mask="some")
    found, inner = trace(case), oracle_statistics(case)
    before, after = inner.segment_loss_before, inner.segment_loss_after
    expected = np.where(before > 0, 1 - after / np.where(before > 0, before, 1), 0)
    assert_close(found.recall, expected, EXACT)


@FRAMEWORKS
def test_heads_without_writes_are_dead(inspect, float32):
    """Also a memory that starts at zero, and one that decays to zero."""
    case = make_case("titans", "none")
    head, ones = np.array([0, 1]), np.ones_like(case.coefficients.step)
    still = case.coefficients._replace(step=0.1 * head * ones, retention=ones)
    np.testing.assert_array_equal(
        inspect(case._replace(coefficients=still)).dead_heads, [[True, False]] * 2
    )
    decayed = case.coefficients._replace(
        step=np.where(head, 1e-5, 0.1 * ones),
        momentum=0 * ones,
        retention=np.where(head, 0.1, ones),
    )
    np.testing.assert_array_equal(
        inspect(case._replace(coefficients=decayed)).dead_heads, [[False, True]] * 2
    )
    late = ones.copy()
    late[:, 6:] = 0  # updates stop half way
    np.testing.assert_array_equal(
        inspect(
            case._replace(coefficients=still._replace(step=0.1 * late, momentum=0 * ones))
        ).dead_heads,
        [[True, True]] * 2,
    )
    case = make_case("linear", "none")
    empty = case._replace(v=case.v * head[:, None], initial=(np.zeros_like(case.initial[0]),))
    np.testing.assert_array_equal(inspect(empty).dead_heads, [[True, False]] * 2)


@FRAMEWORKS
@pytest.mark.parametrize(
    "memory",
    [pytest.param(m, marks=() if m in ("linear", "titans") else pytest.mark.slow) for m in KINDS],
)
def test_small_step_decreases_inner_loss(inspect, float32, memory):
    case = make_case(memory, "none", chunk_size=1)
    ones = np.ones_like(case.coefficients.step)
    case = case._replace(
        coefficients=case.coefficients._replace(
            step=1e-3 * ones,
            retention=ones,
            momentum=None if case.coefficients.momentum is None else 0 * ones,
            previous=None if case.coefficients.previous is None else 0 * ones,
        )
    )
    inner = inspect(case)
    assert np.all(np.asarray(inner.loss_after) < np.asarray(inner.loss_before))


@FRAMEWORKS
def test_update_norms_are_precise_in_float32(inspect, float32):
    """W_t - W_{t-1} is dominated by (α - 1) W_{t-1}."""
    case = make_case("dla", "none", tokens=8, segment_size=8, chunk_size=8)
    retention = np.float64(np.float32(1 - 1e-4))
    ones = np.ones_like(case.coefficients.step)
    at = case.coefficients._replace(step=1e-9 * ones, retention=retention * ones)
    case = case._replace(coefficients=at)
    assert_close(
        inspect(case, float32).update_norm, oracle_statistics(case).update_norm, 1e-6, 1e-9
    )


@FRAMEWORKS
def test_recurrent_method_rejects_inspect(inspect, float32):
    case = make_case()
    package, arrays = (
        (mc_jax, jax_calls.arrays(case)) if inspect is jax_inner
        else (mc_torch, torch_calls.arrays(case))
    )  # fmt: skip
    with pytest.raises(ValueError, match="inspect = True: method = 'recurrent' must be 'chunked'"):
        package.memory_caching(**arrays, config=case.config, method="recurrent", inspect=True)


@pytest.mark.parametrize("name", [pytest.param("swla", marks=pytest.mark.slow), "titans-norm"])
def test_layer_trace_matches_function(name, monkeypatch):
    """The trace matches that of the layer's function inputs, also with NaN at masked tokens."""
    config, calls = CONFIGS[name], []
    run = oracle.memory_caching

    def spy(*args: Any, mask: Array | None, norm: Any, **gates: Any) -> Any:
        calls.append(FunctionCase(*args[:6], norm, args[6], mask))
        return run(*args, mask=mask, norm=norm, **gates)

    monkeypatch.setattr(oracle, "memory_caching", lambda *a, **o: spy(*a, **o))
    layer, rng = make_layer(config), np.random.default_rng(0)
    x, mask = rng.standard_normal((2, 11, 8)), make_mask("some", 2, 11, config, rng)
    layer_oracle(parameters(layer), config, x, mask)
    expected = oracle_statistics(calls[0])
    dirty = jnp.where(jnp.asarray(mask)[:, :, None], x, jnp.nan)
    _, trace = nnx.jit(lambda layer, x: layer.inspect(x, jnp.asarray(mask)))(layer, dirty)
    assert_close(inner_loop(trace), expected, EXACT)


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_trace_counts_and_names(package):
    """Under `ssc` every token reads `top_k` cached memories, or all if there are fewer."""
    config = MCConfig(8, 2, LinearConfig(), "ssc", ssc_top_k=2, segment_size=3)
    x, mask = np.random.default_rng(0).standard_normal((2, 11, 8)), np.arange(11) < [[11], [8]]
    if package == "jax":
        layer = mc_jax.MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        trace = nnx.jit(lambda m, x: m.inspect(x, jnp.asarray(mask))[1])(layer, jnp.asarray(x))
    else:
        layer = mc_torch.MemoryCachingLayer(config, dtype=torch.float64)
        with torch.no_grad():
            trace = layer.inspect(torch.tensor(x), torch.tensor(mask))[1]
    assert trace.router_weights is trace.gates
    assert trace.momentum_norm is None
    gates, counts = np.asarray(trace.gates), np.asarray(trace.read_count)
    np.testing.assert_array_equal(counts, (gates[..., :-1] > 0).sum(1).swapaxes(1, 2))
    np.testing.assert_array_equal(counts.sum(1), [[3 * 1 + 5 * 2] * 2, [3 * 1 + 2 * 2] * 2])


@pytest.mark.parametrize("name", ["linear-learned", pytest.param("titans", marks=pytest.mark.slow)])
def test_trace_gradients_are_finite(name):
    """Also at zero arguments of roots (empty memory) and logarithms (unread memory)."""
    layer = mc_jax.MemoryCachingLayer(CONFIGS[name], rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    graph, state = nnx.split(layer)
    x, mask = jnp.ones((2, 11, 8)), jnp.asarray(np.arange(11) < [[11], [0]])

    @jax.jit
    @jax.grad
    def gradient(state: nnx.State) -> jax.Array:
        leaves = jax.tree.leaves(nnx.merge(graph, state).inspect(x, mask))
        floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((jnp.sum(x) for x in floating[1:]), jnp.sum(jnp.sin(floating[0])))

    gradients = jax.tree.leaves(gradient(state))
    assert all(np.isfinite(x).all() for x in gradients)
    assert any(np.asarray(x).any() for x in gradients)
