"""`mc_torch`: any split of a sequence into calls matches a full pass."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cases
from helpers.cases import AGGREGATIONS, MASKS, MEMORIES, MODES, assert_close, make_case
from helpers.covering_arrays import thinned
from helpers.recurrence_cases import examples
from helpers.torch_calls import arrays, call, leaves, projected
from helpers.torch_layers import draw, make_layer
from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_torch import LanguageModel, extend, grow, init_cache
from mc_torch.numerics import tree_map

EXACT, GRADIENT = 1e-10, 1e-9
TITANS = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=3, conv_width=3)
LEARNED = {"gate_bias": 0.5, "softmax_temperature": "learned", "pool_norm": "l2"}
SWLA = MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=3, chunk_size=2, conv_width=2, **LEARNED)
RESTART = MCConfig(
    8, 2, TitansConfig(), "soup", segment_size=4, state_init_mode="restart", gate="token"
)
SUM = MCConfig(8, 2, LinearConfig(coefficients="token"), "mean", segment_size=3, pooling="sum")
ORTHOGONAL = MCConfig(
    8, 2, DLAConfig(chunk_update="orthogonal"), "soup", segment_size=5, chunk_size=3
)
LAYERS = pytest.mark.parametrize(
    "config",
    [TITANS, SWLA, RESTART, SUM, ORTHOGONAL],
    ids=["titans", "swla", "restart", "sum", "orthogonal"],
)


@st.composite
def streams(draw_from, memory, mode):
    """Draw a case, and a split of its tokens into calls."""
    tokens = draw_from(st.integers(2, 17))
    case = make_case(
        memory,
        draw_from(st.sampled_from(AGGREGATIONS)),
        tokens=tokens,
        mask=draw_from(st.sampled_from(MASKS)),
        state_init_mode=mode,
        segment_size=draw_from(st.integers(1, 6)),
        chunk_size=draw_from(st.integers(1, 7)),
        pooling=draw_from(st.sampled_from(("mean", "sum"))),
        gate=draw_from(st.sampled_from(cases.GATES)),
        gate_bias=draw_from(st.sampled_from((None, 1.0))),
        pool_norm=draw_from(st.sampled_from(("none", "l2"))),
        seed=draw_from(st.integers(0, 99)),
    )
    cuts = draw_from(st.sets(st.integers(1, tokens - 1), min_size=1, max_size=6))
    return case, tuple(np.diff([0, *sorted(cuts), tokens]).tolist())


def inputs_at(inputs, tokens):
    """Slice the inputs that have a token axis."""
    names = (*"qkvu", "coefficients")
    return inputs | {name: tree_map(lambda x: x[:, tokens], inputs[name]) for name in names}


def stream(inputs, case, parts, cache_dtype=None):
    """Run a case's tokens call by call."""
    where, outputs = 0, []
    cache = init_cache(
        inputs["initial"], case.config, len(case.q), case.tokens, cache_dtype=cache_dtype
    )
    for part in parts:
        here = inputs_at(inputs, slice(where, where + part))
        mask = None if case.mask is None else torch.tensor(case.mask[:, where : where + part])
        result = extend(**here, cache=cache, config=case.config, mask=mask)
        outputs.append(result.output)
        where, cache = where + part, result.cache
    return torch.cat(outputs, dim=1), cache


def comparable(cache, config):
    """Return the content of a cache, without slots that only a full pass stores.

    A full pass also stores the online segment, and all segments where a stream keeps only a sum.
    """
    parts = cache._asdict() | {"stored": cache.segments, "conv": cache.conv}
    if not config.slots(1):
        del parts["stored"]
    return parts


def check(case, parts):
    inputs = arrays(case)
    with torch.no_grad():
        whole = call(inputs, case)
        output, cache = stream(inputs, case, parts)
    assert_close(output, whole.output, EXACT, name="output")
    expected = comparable(whole.cache, case.config)
    assert_close(comparable(cache, case.config), expected, EXACT, name="cache")


@thinned(2, memory=list(MEMORIES), mode=MODES)
@given(data=st.data())
@settings(examples, max_examples=12)
def test_split_stream_matches_full_pass(data, memory, mode):
    check(*data.draw(streams(memory, mode)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", MEMORIES)
@given(data=st.data())
@settings(examples, max_examples=80)
def test_split_stream_matches_full_pass_on_large_grid(data, memory, mode):
    check(*data.draw(streams(memory, mode)))


@thinned(
    2,
    memory=["linear-normalized", "swla", "dla", "titans-norm"],
    mode=MODES,
    aggregation=AGGREGATIONS,
)
def test_stream_gradients_match_full_pass(memory, mode, aggregation):
    """Gradients of all inputs, through all caches."""
    options = {"gate_bias": 0.0, "pool_norm": "l2"} if memory in ("swla", "dla") else {}
    case = make_case(memory, aggregation, tokens=11, mask="some", state_init_mode=mode, **options)
    results = []
    for run in (call, lambda inputs, case: stream(inputs, case, (3, 1, 5, 2))):
        inputs = arrays(case)
        output, cache, *_ = run(inputs, case)
        scalar = projected((output, comparable(cache, case.config)))
        actual = torch.autograd.grad(scalar, leaves(inputs), materialize_grads=True)
        results.append([x.numpy() for x in actual])
    assert_close(results[1], results[0], GRADIENT, name="gradient")


def streamed(layer, x, parts, mask=None, cache=None, run=None):
    """Extend a layer by x, call by call."""
    outputs, where = [], 0
    cache = layer.init_cache(len(x), x.shape[1]) if cache is None else cache
    for part in parts:
        here = slice(where, where + part)
        y, cache = (run or layer.extend)(x[:, here], cache, None if mask is None else mask[:, here])
        outputs.append(y)
        where += part
    return torch.cat(outputs, dim=1), cache


@LAYERS
def test_layer_stream_gradients_match_full_pass(config):
    layer, x = make_layer(config), draw(2, 11, 8)
    mask = draw(2, 11, seed=1) < 1
    results = []
    for run in (
        layer.forward_with_cache,
        lambda *given: streamed(layer, given[0], (4, 1, 6), mask),
    ):
        given_x = x.clone().requires_grad_()
        y, cache = run(given_x, mask)
        parts = [y, comparable(cache, config)]
        tensors = [given_x, *layer.parameters()]
        gradient = torch.autograd.grad(projected(parts), tensors, materialize_grads=True)
        results.append([parts, [g.numpy() for g in gradient]])
    (whole, expected), (parts, actual) = results
    assert_close(tree(parts), tree(whole), EXACT)
    assert_close(actual, expected, GRADIENT)


def tree(parts):
    """Detach the tensors of nested dictionaries and sequences."""
    if isinstance(parts, dict):
        return {name: tree(x) for name, x in parts.items()}
    return [tree(x) for x in parts] if isinstance(parts, list | tuple) else parts.detach()


@LAYERS
def test_full_pass_cache_can_be_extended(config):
    layer, x = make_layer(config), draw(2, 13, 8)
    with torch.no_grad():
        whole = layer(x)
        y, cache = layer.forward_with_cache(x[:, :6])
        with pytest.raises(
            ValueError, match=r"max_tokens = 6: the call would advance position 6 to 13"
        ):
            layer.extend(x[:, 6:], cache)
        cache = layer.grow(cache, 13)
        rest, cache = streamed(layer, x[:, 6:], (1, 4, 2), cache=cache)
    assert_close(torch.cat([y, rest], dim=1), whole, EXACT)
    assert cache.position.tolist() == [13, 13]
    with pytest.raises(ValueError, match="max_tokens = 12: must be >= 13"):
        grow(cache, config, 12)


@LAYERS
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padded_rows_match_single_rows(config, side):
    layer, x, lengths = make_layer(config), draw(3, 9, 8), torch.tensor([9, 4, 0])
    mask = draw(3, 9, seed=2) < 1
    place = torch.arange(9)
    padding = {
        "left": place < 9 - lengths[:, None],
        "right": place >= lengths[:, None],
        "anywhere": (place * 5) % 9 >= lengths[:, None],
    }[side]
    with torch.no_grad():
        before, cache = streamed(layer, x, (9,), mask, layer.init_cache(3, 23))
        y, cache = layer.extend(x, cache, mask, padding=padding)
        after, cache = layer.extend(x[:, :5], cache)
        assert not y[padding].any()
        for row in range(3):
            one, real = slice(row, row + 1), ~padding[row]
            parts = [x[one], x[one][:, real], x[one, :5]]
            masks = torch.cat([mask[one], mask[one][:, real], torch.ones(1, 5).bool()], dim=1)
            alone, expected = streamed(
                layer, torch.cat(parts, 1), (len(masks[0]),), masks, layer.init_cache(1, 23)
            )
            actual = torch.cat([before[one], y[one][:, real], after[one]], dim=1)
            assert_close(actual, alone, EXACT)
            ours = tree_map(lambda c, one=one: c[one] if c.ndim else c, cache)
            assert_close(comparable(ours, config), comparable(expected, config), EXACT)


@LAYERS
def test_cache_supports_two_continuations(config):
    layer, x, other = make_layer(config), draw(2, 12, 8), draw(2, 12, 8, seed=1)
    other[:, :5] = x[:, :5]
    with torch.no_grad():
        _, cache = streamed(layer, x[:, :5], (2, 3), cache=layer.init_cache(2, 12))
        before = [leaf.clone() for leaf in leaves(cache)]
        results = [streamed(layer, each[:, 5:], (1, 1, 5), cache=cache)[0] for each in (x, other)]
        assert all(torch.equal(a, b) for a, b in zip(leaves(cache), before, strict=True))
        for each, y in zip((x, other), results, strict=True):
            assert_close(y, layer(each)[:, 5:], EXACT)


def test_slots_are_copied_only_when_a_segment_completes():
    layer, x = make_layer(TITANS), draw(1, 9, 8)
    cache, copied = layer.init_cache(1, 9), []
    with torch.no_grad():
        for token in x.split(1, dim=1):
            pointer = cache.stored.weights[0].data_ptr()
            cache = layer.extend(token, cache)[1]
            copied.append(cache.stored.weights[0].data_ptr() != pointer)
    assert copied == [False, False, False, True] * 2 + [False]


def test_positions_past_capacity_give_nan():
    case = make_case("titans", tokens=6)
    inputs = arrays(case)
    short = init_cache(inputs["initial"], case.config, 2, 5)
    output, cache, *_ = extend(**inputs, cache=short, config=case.config)
    assert output.isnan().all()
    assert cache.position.tolist() == [6, 6]
    count = torch.tensor([6, 5], dtype=torch.int32)
    output = extend(**inputs, cache=short, config=case.config, count=count).output
    assert output[0].isnan().all()
    assert output[1].isfinite().all()


def check_one_program_of_steps(config, size, backend):
    layer, x = make_layer(config), draw(2, 12, 8)
    parts = (size,) * (12 // size)
    torch._dynamo.reset()
    run = torch.compile(layer.extend, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected, final = streamed(layer, x, parts)
        first, cache = run(x[:, :size], layer.init_cache(2, 12))
        with torch.compiler.set_stance("fail_on_recompile"):
            rest, cache = streamed(layer, x[:, size:], parts[1:], cache=cache, run=run)
            past, _ = run(x[:, :size], final)
    assert_close(torch.cat([first, rest], dim=1), expected, 1e-12)
    assert_close(tree(cache), tree(final), 1e-12)
    assert past.isnan().all(), "a compiled program cannot raise"


@pytest.mark.parametrize(
    ("config", "size", "backend"),
    [
        pytest.param(TITANS, 1, "eager", marks=pytest.mark.slow),
        pytest.param(SWLA, 3, "eager", marks=pytest.mark.slow),
        pytest.param(RESTART, 3, "eager", marks=pytest.mark.slow),
        pytest.param(SUM, 1, "aot_eager", marks=pytest.mark.slow),
    ],
    ids=["titans", "swla", "restart", "sum"],
)
def test_extend_compiles_once(config, size, backend):
    """One Dynamo graph; for the cheapest layer also with AOTAutograd."""
    check_one_program_of_steps(config, size, backend)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
@LAYERS
def test_extend_compiles_once_per_length(config, size):
    check_one_program_of_steps(config, size, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # required by the compiler
@pytest.mark.parametrize("config", [TITANS, SUM], ids=["titans", "sum"])
def test_compiled_gradients_through_cache(config):
    layer, x = make_layer(config), draw(2, 9, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer.extend, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer.extend, compiled):
        given_x = x.clone().requires_grad_()
        y, cache = streamed(layer, given_x, (3, 3, 3), run=run)
        tensors = [given_x, *layer.parameters()]
        actual = torch.autograd.grad(projected((y, cache)), tensors, materialize_grads=True)
        results.append([g.numpy() for g in actual])
    assert_close(*results, 1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_stream_state_is_float32_under_autocast(mode):
    layer, x = make_layer(TITANS, dtype=torch.float32), draw(2, 9, 8, dtype=torch.float32)
    with mode():
        plain, _ = streamed(layer, x, (4, 5))
        with torch.autocast("cpu", torch.bfloat16):
            y, cache = streamed(layer, x, (4, 5))
            whole, result = layer._run(x, None)
    assert y.dtype == torch.float32
    assert {leaf.dtype for leaf in leaves(cache)} == {torch.float32, torch.int32}
    assert 0 < (y - plain).abs().max() < 0.1 * plain.abs().max()
    assert_close(y.detach(), whole.detach(), 2e-2)
    assert_close(tree(cache.state), tree(result.cache.state), 2e-2)


@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc"])
def test_bfloat16_cached_memories(aggregation):
    config = MCConfig(8, 2, TitansConfig(expansion=1), aggregation, segment_size=4, chunk_size=3)
    layer, x = make_layer(config), draw(2, 11, 8)
    with torch.no_grad():
        exact, other = streamed(layer, x, (5, 6))
        y, cache = streamed(
            layer, x, (5, 6), cache=layer.init_cache(2, 11, cache_dtype=torch.bfloat16)
        )
    kept = {leaf.dtype for leaf in cache.stored.weights}
    assert kept == {torch.bfloat16}
    assert {leaf.dtype for leaf in leaves(cache._replace(stored=()))} == {
        torch.float64,
        torch.int32,
    }
    assert torch.equal(y[:, :4], exact[:, :4]), "nothing is cached yet"
    assert 0 < (y - exact).abs().max() < 0.02 * exact.abs().max()
    assert_close(tree(cache.state), tree(other.state), EXACT)


@pytest.mark.parametrize("tie", [True, False])
def test_model_stream_matches_full_pass(tie):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=11, num_layers=2, layer=TITANS, tie_embeddings=tie)
    model = LanguageModel(config, dtype=torch.float64)
    tokens = torch.randint(11, (2, 9))
    mask, padding = draw(2, 9) < 1, torch.arange(9) < torch.tensor([[0], [4]])
    with torch.no_grad():
        logits = model(tokens, mask)
        cache = model.init_cache(2, 5)
        first, cache = model.extend(tokens[:, :5], cache, mask[:, :5])
        with pytest.raises(ValueError, match=r"grow\(cache, 9\) first"):
            model.extend(tokens[:, 5:], cache)
        second, cache = model.extend(tokens[:, 5:], model.grow(cache, 9), mask[:, 5:])
        assert_close(torch.cat([first, second], dim=1), logits, EXACT)
        padded, cache = model.extend(tokens, model.init_cache(2, 9), padding=padding)
        assert_close(padded[1, 4:], model(tokens[1:, 4:])[0], EXACT)
        assert_close(padded[0], model(tokens[:1])[0], EXACT)
    assert [one.position.tolist() for one in cache] == [[9, 5]] * 2
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 9\): must be \[b, t\] with b = 2"):
        model.extend(tokens[:1], cache)


def test_invalid_streams_are_rejected():
    layer, x = make_layer(TITANS), draw(2, 4, 8)
    cache = layer.init_cache(2, 4)
    for words, given_x in (
        (r"x has shape \(2, 4, 7\): must be \[b, t, 8\]", x[..., :7]),
        (r"x has shape \(1, 4, 8\): .* with b = 2", x[:1]),
    ):
        with pytest.raises(ValueError, match=words):
            layer.extend(given_x, cache)
    with pytest.raises(ValueError, match="max_tokens = 0: must be >= 1"):
        layer.init_cache(2, 0)
    with pytest.raises(ValueError, match="advance position 0 to 5"):
        layer.extend(draw(2, 5, 8), cache)
    padding = torch.arange(5) < torch.tensor([[1], [2]])
    assert layer.extend(draw(2, 5, 8), cache, padding=padding)[1].position.tolist() == [4, 3]
    logarithmic = MCConfig(8, 2, segmentation="logarithmic")
    with pytest.raises(ValueError, match="must be 'constant' or 'fenwick' for streaming"):
        make_layer(logarithmic).init_cache(1, 4)


def test_summed_reads_store_no_slots():
    for memory in cases.MATRICES:
        for aggregation in ("none", "residual", "mean"):
            case = make_case(memory, aggregation)
            cache = init_cache(arrays(case)["initial"], case.config, 2, 100)
            assert cache.stored.length.shape == (2, 0)
            assert bool(cache.total) == (aggregation != "none")
