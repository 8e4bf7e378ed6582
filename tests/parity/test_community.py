"""Comparison with the layers of `memory-caching` 0.1.0, on the same weights."""

import dataclasses
import functools
import itertools
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import mc_jax
import mc_torch
from helpers.covering_arrays import thinned
from helpers.tiny_run import mc
from mc_core import DLAConfig, TitansConfig
from parity import community
from parity.community import PARAMETERS, from_community
from parity.weights import load_jax, load_torch, to_jax

if sys.version_info >= (3, 13):
    pytest.skip("memory-caching 0.1.0 requires Python < 3.13", allow_module_level=True)

import memory_caching as theirs

D, HEADS, TOKENS, SEGMENT = 8, 2, 13, 4
OUTPUT, GRADIENT = {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-9, "atol": 1e-9}
KINDS = ("linear", "swla", "dla", "titans")
MODES = ("checkpoint", "restart")
SEGMENTATIONS = ("constant", "logarithmic")
AGGREGATIONS = ("residual", "grm", "soup", "ssc")
DLA = theirs.DLAConfig(8, inner_update_mode="differentiable")
TITANS = theirs.TitansConfig(
    8, inner_update_mode="differentiable", update_convention="gradient_descent"
)
SWLA = theirs.SWLAConfig(0.9, -0.4, 0.8)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configure(kind, **changes):
    options = {"segment_size": SEGMENT, "dla": DLA, "titans": TITANS, "swla": SWLA}
    return theirs.MCConfig(D, HEADS, backend=kind, **options | changes)


def held(kind, config, initial):
    """Return its backend with another initial memory, and with biases fixed at zero."""
    base = {"dla": theirs.DLABackend, "titans": theirs.TitansBackend}[kind]

    class Held(base):
        def init_state(self, *, batch_size, **options):
            state = super().init_state(batch_size=batch_size, **options)
            weights = tuple(w.expand(batch_size, *w.shape).clone() for w in initial)
            return dataclasses.replace(state, weights=weights)

        def update(self, state, k_t, v_t):
            state = super().update(state, k_t, v_t)
            zeros = tuple(torch.zeros_like(bias) for bias in state.biases)
            return dataclasses.replace(state, biases=zeros)

    return Held(config)


def draw_initial(config):
    """Return memory weights [h, out, in] per layer; () for matrix memories."""
    if config.backend in ("linear", "swla"):
        return []
    part = getattr(config, config.backend)
    dims = [D // HEADS, *[part.memory_width] * (part.memory_depth - 1), D // HEADS]
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator, "dtype": torch.float64}
    shapes = [(HEADS, out, into) for into, out in itertools.pairwise(dims)]
    return [(torch.randn(shape, **options) / 2).requires_grad_() for shape in shapes]


def build(config, backend=None):
    """Return its layer and initial memory."""
    torch.manual_seed(1)
    initial = draw_initial(config)
    if backend is None:
        backend = {
            "linear": theirs.LinearMemoryBackend,
            "swla": lambda: theirs.SWLABackend(config.swla),
            "dla": lambda: held("dla", config.dla, initial),
            "titans": lambda: held("titans", config.titans, initial),
        }[config.backend]()
    return theirs.MemoryCachingLayer(config=config, backend=backend).double(), initial


def mirror(layer, initial):
    """Return our layer with its weights."""
    config, flat = from_community(layer.config, layer.state_dict(), initial)
    ours = mc_torch.MemoryCachingLayer(config, dtype=torch.float64)
    load_torch(ours, flat)
    return ours


@functools.cache
def batch():
    """Return tokens, a cotangent, and a mask: a whole segment, a token in all rows, both ends."""
    generator = torch.Generator().manual_seed(3)
    x, cotangent = torch.randn(2, 2, TOKENS, D, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, TOKENS, generator=generator) > 0.3
    mask[0, SEGMENT : 2 * SEGMENT] = False
    mask[:, 10] = mask[1, 0] = mask[1, -1] = False
    return x, cotangent, mask


def assert_same(config, masked, **options):
    """Compare outputs, and gradients of the tokens and of every parameter."""
    layer, initial = build(config)
    ours = mirror(layer, initial)
    x, cotangent, mask = batch()
    mask = mask if masked else None
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = layer(left, attention_mask=mask, **options)
    actual = ours(right, mask=mask, **options)
    torch.testing.assert_close(actual, expected, **OUTPUT)
    expected.backward(cotangent)
    actual.backward(cotangent)
    pairs = {"x": (right.grad, left.grad)}
    grads = {name: p.grad for name, p in ours.named_parameters()}
    pairs |= {f"initial.{i}": (grads.pop(f"initial.{i}"), w.grad) for i, w in enumerate(initial)}
    for name, parameter in layer.named_parameters():
        if name == "u_proj.weight" and not (ours.config.gated and not config.use_q_as_u):
            assert parameter.grad is None
        else:
            pairs[name] = grads.pop(PARAMETERS[name]), parameter.grad
    assert not grads
    for name, (ours_grad, its_grad) in pairs.items():
        assert its_grad.any(), name
        torch.testing.assert_close(
            ours_grad, its_grad, **GRADIENT, msg=lambda text, name=name: f"{name}: {text}"
        )


@thinned(
    3,
    kind=KINDS,
    aggregation=AGGREGATIONS,
    mode=MODES,
    segmentation=SEGMENTATIONS,
    mask=("whole", "masked"),
)
def test_outputs_and_gradients_match_community_package(kind, aggregation, mode, segmentation, mask):
    config = configure(
        kind, aggregation=aggregation, state_init_mode=mode, segmentation=segmentation
    )
    assert_same(config, mask == "masked")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("linear", {"use_q_as_u": True, "softmax_temperature": 0.7}),
        ("linear", {"aggregation": "ssc", "ssc_top_k": 1, "softmax_temperature": 1.5}),
        ("swla", {"detach_cached_states": True}),
        ("titans", {"detach_cached_states": True, "aggregation": "soup"}),
        ("dla", {"detach_cached_context": True}),
        ("dla", {"dla": dataclasses.replace(DLA, momentum=0.6)}),
        ("dla", {"dla": dataclasses.replace(DLA, objective="l2", memory_depth=3)}),
        ("titans", {"titans": dataclasses.replace(TITANS, retention_alpha=0.9, momentum=0.5)}),
        ("titans", {"titans": dataclasses.replace(TITANS, objective="dot", memory_width=4)}),
    ],
)
def test_mapped_fields_are_equivalent(kind, changes):
    assert_same(configure(kind, **changes), masked=True)


@pytest.mark.parametrize("kind", ["linear", "titans"])
def test_explicit_segments_match_community_package(kind):
    assert_same(configure(kind), masked=True, segment_lengths=[2, 1, 6, 4])


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow if k in ("swla", "dla") else ()) for k in KINDS],
)
def test_jax_outputs_match_community_package(float64, kind):
    layer, initial = build(configure(kind))
    config, flat = from_community(layer.config, layer.state_dict(), initial)
    ours = mc_jax.MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    load_jax(ours, to_jax(flat))
    x, _, mask = batch()
    with torch.no_grad():
        expected = layer(x, attention_mask=mask).numpy()
    actual = nnx.jit(ours)(jnp.asarray(x.numpy()), jnp.asarray(mask.numpy()))
    np.testing.assert_allclose(np.asarray(actual), expected, **OUTPUT)


@pytest.mark.parametrize("aggregation", ["grm", "ssc"])
def test_cache_and_gates_match_community_package(aggregation):
    layer, _ = build(configure("linear", aggregation=aggregation))
    ours, (x, _, mask) = mirror(layer, []), batch()
    with torch.no_grad():
        (_, cache), (_, rows) = layer.forward_with_cache(x), layer.inspect(x, attention_mask=mask)
        (_, (segments, *_)), (_, trace) = ours.forward_with_cache(x), ours.inspect(x, mask)
    torch.testing.assert_close(segments.weights[0], torch.stack([c.mem_state for c in cache], 1))
    torch.testing.assert_close(segments.pool, torch.stack([c.seg_context for c in cache], 1))
    assert segments.length.tolist() == [[c.seg_len for c in cache]] * 2
    for token, row in enumerate(rows):
        count = row["cached_count"]
        assert (trace.cached_count[token], trace.segment_index[token]) == (count, count)
        if mask[0, token]:  # its rows are of the first batch row, averaged over heads
            gates = trace.gates[0, token].mean(dim=0)
            weights = torch.tensor(row["router_weights"], dtype=torch.float64)
            torch.testing.assert_close(torch.cat([gates[:count], gates[-1:]]), weights)


@pytest.mark.parametrize("kind", ["dla", "titans"])
def test_community_zero_memory_ignores_query(kind):
    backend = {"dla": theirs.DLABackend(DLA), "titans": theirs.TitansBackend(TITANS)}[kind]
    layer, _ = build(configure(kind, aggregation="residual"), backend)
    x, *_ = batch()
    with torch.no_grad():
        before = layer(x)
        layer.q_proj.weight.normal_()
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["dla", "titans"])
def test_community_bias_updates_explain_difference(kind):
    config = configure(kind)
    initial = draw_initial(config)
    backend = held(kind, getattr(config, kind), initial)
    del type(backend).update
    layer, _ = build(config, backend)
    x, *_ = batch()
    with torch.no_grad():
        assert (mirror(layer, initial)(x) - layer(x)).abs().max() > 0.1


def test_community_default_titans_ascends_loss():
    losses = {}
    for convention in ("paper", "gradient_descent"):
        backend = theirs.TitansBackend(dataclasses.replace(TITANS, update_convention=convention))
        k, v = torch.randn(2, 1, HEADS, D, generator=torch.Generator().manual_seed(0))
        state = backend.init_state(
            batch_size=1, num_heads=HEADS, head_dim=D, device=k.device, dtype=k.dtype
        )
        losses[convention] = []
        for _ in range(32):
            losses[convention].append(backend._loss(backend.apply(state, k), v).item())
            state = backend.update(state, k, v)
    assert losses["paper"][-1] > 1e3 * losses["paper"][0]
    assert losses["gradient_descent"][-1] < 0.1 * losses["gradient_descent"][0]


def test_community_default_detaches_writes():
    config = configure("dla", aggregation="residual", dla=theirs.DLAConfig(8))
    layer, _ = build(config)
    layer(batch()[0]).sum().backward()
    assert layer.k_proj.weight.grad is None
    assert layer.v_proj.weight.grad is None


def fields(kind="linear", **changes):
    return dataclasses.asdict(configure(kind)) | changes


def part(kind, **changes):
    return fields(kind, **{kind: dataclasses.asdict(getattr(configure(kind), kind)) | changes})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (fields(extra=1), "config: unknown key 'extra'"),
        (fields(backend="gru"), r"config.backend = 'gru': must be one of 'linear', 'swla'"),
        (fields(aggregation="mean"), "config.aggregation = 'mean': must be 'residual'"),
        (fields(segment_size=0), "MCConfig.segment_size = 0: must be >= 1"),
        (part("swla", alpha=1.5), r"config.swla.alpha = 1.5: must be in \(0, 1\]"),
        (part("swla", gamma=1), "config.swla: unknown key 'gamma'"),
        (part("dla", inner_update_mode="stopgrad"), "dla.inner_update_mode = 'stopgrad'"),
        (part("titans", update_convention="paper"), "titans.update_convention = 'paper'"),
        (part("titans", memory_width=6), "titans.memory_width = 6: must be a multiple of the head"),
        (
            fields("dla"),
            "'dla': starts at a zero memory.* only 'linear' and 'swla' convert completely",
        ),
    ],
)
def test_unmappable_fields_are_named(given, message):
    layer, _ = build(configure("linear"))
    with pytest.raises(ValueError, match=message):
        from_community(given, layer.state_dict())


def test_mismatched_parameters_are_listed():
    layer, _ = build(configure("linear"))
    state = layer.state_dict() | {"q_proj.bias": torch.zeros(D), "o_proj.weight": torch.zeros(D, 1)}
    state = {name: tensor.float() for name, tensor in state.items() if name != "u_proj.weight"}
    with pytest.raises(ValueError, match="weights do not match") as caught:
        from_community(layer.config, state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing u_proj.weight float32[8, 8]",
        "  unexpected q_proj.bias float32[8]",
        "  must be o_proj.weight float32[8, 8], is float32[8, 1]",
    ]
    zero = [torch.zeros(2, 8, 4, dtype=torch.float64), torch.zeros(2, 4, 8, dtype=torch.float64)]
    with pytest.raises(ValueError, match="initial: must not be zero"):
        from_community(configure("dla"), layer.state_dict(), zero)


def save(path, kind="linear", **changes):
    layer, _ = build(configure(kind))
    config = dataclasses.asdict(layer.config)
    torch.save({"config": config, "state_dict": layer.float().state_dict()} | changes, path)
    return path


@pytest.mark.parametrize("kind", ["linear", pytest.param("swla", marks=pytest.mark.slow)])
def test_convert_command_verifies_outputs(tmp_path, monkeypatch, capsys, kind):
    source, target = save(tmp_path / "old.pt", kind), tmp_path / "new.safetensors"
    assert mc(monkeypatch, "convert", "--from", "community", source, target) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "(community) -> " in out
    distance = float(out.split("outputs of memory-caching 0.1.0 differ by ")[1])
    assert distance < 1e-13
    layer = mc_torch.MemoryCachingLayer.from_pretrained(target)
    assert (
        layer.config == from_community(configure(kind), build(configure(kind))[0].state_dict())[0]
    )
    assert torch.equal(layer.out_proj.weight, torch.load(source)["state_dict"]["o_proj.weight"])


def test_convert_command_reports_errors_and_writes_nothing(tmp_path, monkeypatch, capsys):
    target = tmp_path / "new.pt"
    for source, message in {
        save(tmp_path / "dla.pt", "dla"): "dla.pt: config.backend = 'dla': starts at a zero memory",
        save(tmp_path / "extra.pt", step=1): "extra.pt: file: unknown key 'step'",
        save(tmp_path / "text.pt", state_dict={"a": "b"}): "state_dict must hold only",
        Path(__file__): "test_community.py: ",
    }.items():
        assert mc(monkeypatch, "convert", "--from", "community", source, target) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not target.exists()


def test_wrong_conversion_table_is_detected(tmp_path, monkeypatch, capsys):
    source, target = save(tmp_path / "old.pt"), tmp_path / "new.pt"
    swapped = {"q_proj.weight": "k_proj.weight", "k_proj.weight": "q_proj.weight"}
    monkeypatch.setattr(community, "PARAMETERS", PARAMETERS | swapped)
    assert mc(monkeypatch, "convert", "--from", "community", source, target) == 2
    assert "old.pt: not converted: outputs differ" in capsys.readouterr().err
    assert not target.exists()


def test_convert_command_without_community_package(tmp_path, monkeypatch, capsys):
    source, target = save(tmp_path / "old.pt"), tmp_path / "new.pt"
    monkeypatch.setattr(community, "find_spec", lambda name: None)
    assert mc(monkeypatch, "convert", "--from", "community", source, target) == 0
    assert "0.1.0 is not installed: outputs were not compared" in capsys.readouterr().out


def test_mc_command_belongs_to_this_package():
    script = Path(sys.executable).with_name("mc")
    fault = "memory-caching took the name: pip install --no-deps --force-reinstall --editable ."
    assert not script.exists() or "memory_caching" not in script.read_text(), fault


def test_dla_with_momentum_maps_to_titans():
    config = configure("dla", dla=dataclasses.replace(DLA, momentum=0.6))
    memory = community.map_config(dataclasses.asdict(config)).memory
    assert isinstance(memory, TitansConfig)
    assert (memory.objective, memory.momentum, memory.retention) == ("dot", 0.6, 1.0)
    plain = community.map_config(dataclasses.asdict(configure("dla"))).memory
    assert isinstance(plain, DLAConfig)
