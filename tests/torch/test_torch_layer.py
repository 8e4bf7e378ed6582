"""`mc_torch`: layer and model, compiled, under autocast, and without jax."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers.cases import assert_close, make_mask
from helpers.layer_oracle import CONFIGS, EXACT, layer_oracle
from helpers.torch_calls import leaves
from helpers.torch_layers import draw, make_layer
from mc_core import DLAConfig, LinearConfig, MCConfig, ModelConfig, SWLAConfig, TitansConfig
from mc_torch import LanguageModel, MemoryCachingLayer, memory_caching
from mc_torch.numerics import einsum_f32

ROOT = Path(__file__).parents[2]
SMALL = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=2)
MODEL = ModelConfig(vocab_size=11, num_layers=2, layer=SMALL)


def jax_parameters(layer):
    """Return the parameters with the names and layouts of `mc_jax`, as a nested dictionary."""
    nested = {}
    for name, value in layer.state_dict().items():
        *path, last = name.split(".")
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        if path == ["initial"]:
            last = int(last)
        node["kernel" if last == "weight" else last] = (
            value.T if last == "weight" else value
        ).numpy()
    return nested


@pytest.mark.parametrize("mask", ["none", "some"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_matches_oracle(name, mask):
    config, x = CONFIGS[name], draw(2, 11, 8)
    mask = make_mask(mask, 2, 11, config, np.random.default_rng(0))
    layer = make_layer(config)
    with torch.inference_mode():
        y, trace = layer.inspect(x, None if mask is None else torch.tensor(mask))
    expected, gates = layer_oracle(jax_parameters(layer), config, x.numpy(), mask)
    assert_close(y, expected, EXACT, name="output")
    assert_close(trace.gates, gates, EXACT, name="gates")


@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc"])
def test_learned_gate_parameters_start_without_effect(aggregation):
    """A learned temperature starts at 1; both parameters have gradients."""
    x, outputs = draw(2, 11, 8), []
    for options in ({}, {"softmax_temperature": "learned", "gate_bias": 0.0}):
        torch.manual_seed(0)
        config = MCConfig(8, 2, aggregation=aggregation, segment_size=3, **options)
        layer = MemoryCachingLayer(config, dtype=torch.float64)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
    wanted = layer.gate_temperature, layer.gate_bias
    for gradient in torch.autograd.grad(outputs[1].sin().sum(), wanted):
        assert gradient.abs().min() > 1e-6


def forward_and_backward(run, layer, x, mask=None):
    x = x.clone().requires_grad_()
    y = run(x, mask)
    wanted = [x, *layer.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, draw(*y.shape, dtype=y.dtype, seed=1))]


def check_compiled(config, backend, tokens=(5,), dtype=torch.float64, tolerance=1e-12):
    layer = make_layer(config, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch, t in enumerate(tokens, 2):
        x, mask = draw(batch, t, 8, dtype=dtype), draw(batch, t) < 1
        results = [forward_and_backward(run, layer, x, mask) for run in (compiled, layer)]
        assert_close(*results, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "backend"),
    [
        (MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=3, chunk_size=2), "aot_eager"),
        (MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=2, chunk_size=2, gate="token"), "eager"),
        (MCConfig(8, 2, DLAConfig(expansion=1), "soup", segment_size=3, conv_width=2), "eager"),
    ],
    ids=["swla-ssc", "swla-ssc-token", "dla-soup"],
)
def test_compiles_without_graph_breaks(config, backend):
    """With Dynamo, and one case with AOTAutograd."""
    check_compiled(config, backend)


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["none", "residual", "grm", "soup", "ssc", "mean"])
@pytest.mark.parametrize("mode", ["checkpoint", "restart"])
@pytest.mark.parametrize(
    "memory",
    [
        LinearConfig(feature_map="elu+1", normalize=True),
        SWLAConfig(),
        DLAConfig(expansion=2),
        TitansConfig(expansion=1, norm="layer"),
    ],
    ids=lambda memory: memory.kind,
)
def test_all_memories_and_reads_compile(memory, mode, aggregation):
    config = MCConfig(8, 2, memory, aggregation, segment_size=5, chunk_size=3, state_init_mode=mode)
    check_compiled(config, "aot_eager", tokens=(13,))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch")  # inductor uses functions that torch deprecates
@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc"])
@pytest.mark.parametrize(
    "memory", [LinearConfig(), TitansConfig(expansion=1)], ids=["linear", "titans"]
)
def test_inductor_compiles_several_shapes(memory, aggregation):
    config = MCConfig(8, 2, memory, aggregation, segment_size=4, chunk_size=2, conv_width=2)
    check_compiled(config, "inductor", (7, 10, 9), torch.float32, 2e-5)


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_state_is_float32_under_autocast(backend):
    layer, x = make_layer(SMALL, dtype=torch.float32), draw(2, 9, 8, dtype=torch.float32)
    run = layer._run
    if backend:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend=backend)
    seen = []
    layer.q_proj.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y, result = run(x, None)
    assert seen[:1] in ([torch.bfloat16], [])
    assert y.dtype == torch.float32
    assert result.output.dtype == torch.bfloat16
    kinds = {leaf.dtype for leaf in leaves((result.cache, result.gates))}
    assert kinds == {torch.float32, torch.int32}
    plain = layer(x)
    assert 0 < (y - plain).abs().max() < 0.1 * plain.abs().max()
    y.sum().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters()
    )


def test_products_accumulate_in_float32():
    a, b = draw(8, 16, dtype=torch.bfloat16), draw(16, 8, dtype=torch.bfloat16)
    exact = (a.double() @ b.double()).float()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for x, y in ((a, b), (a.float(), b.float())):
                close = einsum_f32("ij,jk->ik", x, y)
                assert close.dtype == torch.float32
                torch.testing.assert_close(close, exact, rtol=1e-5, atol=1e-5)


def test_exact_products_ignore_tf32():
    settings = torch.backends.cuda.matmul
    a, b = draw(8, 99, dtype=torch.float32), draw(99, 8, dtype=torch.float32)
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        exact = einsum_f32("ij,jk->ik", a, b, exact=True)
    finally:
        settings.fp32_precision = before
    assert torch.equal(exact, (a.double() @ b.double()).float())
    assert torch.equal(einsum_f32("ij,jk->ik", a, b, exact=True), a @ b)


@pytest.mark.parametrize("config", [SMALL, CONFIGS["swla"]], ids=["titans", "swla"])
def test_values_at_masked_tokens_are_ignored(config):
    layer, x = make_layer(config), draw(2, 9, 8)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:6] = mask[1, :2] = mask[1, 8:] = False
    clean = forward_and_backward(layer, layer, torch.where(mask[..., None], x, 0.0), mask)
    dirty = forward_and_backward(layer, layer, torch.where(mask[..., None], x, torch.nan), mask)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[0][~mask].any()
    assert not clean[1][~mask].any()


def test_forward_cache_and_inspect_agree():
    layer, x = make_layer(SMALL), draw(2, 10, 8)
    mask = torch.arange(10) < torch.tensor([[10], [5]])
    with torch.no_grad():
        y = layer(x, mask)
        y_cache, cache = layer.forward_with_cache(x, mask)
        y_trace, trace = layer.inspect(x, mask)
    assert torch.equal(y, y_cache)
    assert torch.equal(y, y_trace)
    assert cache.segments.length.tolist() == [[4, 4, 2], [4, 1, 0]]
    assert torch.equal(cache.segments.length, trace.segment_length)
    assert trace.gates.shape == (2, 10, 2, 4)
    assert (
        trace.segment_index.tolist() == trace.cached_count.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    )
    norms = sum((w * w).sum((-2, -1)) for w in cache.segments.weights).sqrt()
    assert torch.equal(trace.segment_norm, norms)
    assert trace.entropy.max() <= math.log(3) + 1e-12
    with pytest.raises(ValueError, match=r"x has shape \(2, 10, 7\): must be \[b, t, 8\]"):
        layer(x[..., :7])


def test_explicit_segment_lengths():
    layer, x = make_layer(SMALL), draw(2, 10, 8)
    assert torch.equal(layer(x, None, (4, 4, 2)), layer(x))
    assert not torch.equal(layer(x, None, (4, 6)), layer(x))
    with pytest.raises(ValueError, match="segment_lengths"):
        layer(x, None, (4, 4))


def test_plan_created_in_inference_mode_works_in_training():
    layer, x = make_layer(SMALL), draw(1, 29, 8)
    with torch.inference_mode():
        layer(x)
    assert all(g.isfinite().all() for g in forward_and_backward(layer, layer, x))


def test_parameter_initialization():
    torch.manual_seed(0)
    config = MCConfig(256, 4, TitansConfig(), conv_width=4)
    layer = MemoryCachingLayer(config)
    weight = layer.q_proj.weight
    assert weight.dtype == torch.float32
    assert weight.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert weight.abs().max() <= 2 * 256**-0.5 / 0.8796 + 1e-6  # a truncated normal
    assert [w.shape for w in layer.initial] == [(4, 256, 64), (4, 64, 256)]
    for w in layer.initial:
        assert w.std().item() == pytest.approx(w.shape[-1] ** -0.5, rel=0.02)
    assert layer.coefficients["step"].weight.std().item() == pytest.approx(0.02, rel=0.1)
    x = draw(1, 3, 256, dtype=torch.float32)
    assert torch.equal(layer.q_conv(x), x)
    at = {name: c(torch.zeros(1, 1, 256))[0, 0, 0].item() for name, c in layer.coefficients.items()}
    memory = config.memory
    assert at == pytest.approx(
        {"step": memory.step, "retention": memory.retention, "momentum": memory.momentum}, rel=1e-5
    )
    model = LanguageModel(ModelConfig(64, 1, config))
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.slow
def test_model_overfits_a_batch():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(11, 1, SMALL, tie_embeddings=False))
    tokens = torch.randint(11, (2, 9))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_model_logits_and_traces():
    torch.manual_seed(0)
    model = LanguageModel(MODEL, dtype=torch.float64)
    tokens = torch.randint(11, (2, 6))
    logits, traces = model.inspect(tokens)
    assert torch.equal(logits, model(tokens))
    assert logits.dtype == torch.float64
    assert [trace.gates.shape for trace in traces] == [(2, 6, 2, 3)] * 2
    again = LanguageModel(ModelConfig(**{**vars(MODEL), "remat": True}), dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    grads = [
        torch.autograd.grad(m(tokens).sin().sum(), list(m.parameters())) for m in (model, again)
    ]
    assert_close([g.numpy() for g in grads[0]], [g.numpy() for g in grads[1]], 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert LanguageModel(MODEL)(tokens).dtype == torch.float32


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_of_a_second_call_in_the_same_autocast(remat):
    """The first call has cached casts of the parameters, which the recomputation lacks."""
    gradients, tokens = [], torch.arange(12).reshape(2, 6) % 11
    for policy in ("none", remat):
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(**{**vars(MODEL), "remat": policy}))
        with torch.autocast("cpu", torch.bfloat16):
            losses = [model(tokens).float().square().mean() for _ in range(2)]
        gradients.append(torch.autograd.grad(losses[1], list(model.parameters())))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_remat_dots_does_not_recompute_products_with_weights():
    """`full` recomputes them; the products of memories are recomputed under both."""
    counts = {}
    for remat in ("none", "full", "dots"):
        model = LanguageModel(ModelConfig(**{**vars(MODEL), "remat": remat}))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 6, dtype=torch.int64)).sum().backward()
        found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
        counts[remat] = found["aten.mm"], found["aten.bmm"]
    (plain, memories), (full, _), (dots, recomputed) = counts.values()
    assert dots == plain < full
    assert recomputed > memories


def test_invalid_inputs_are_rejected():
    x = draw(1, 4, 2, 4)
    layer = make_layer(SMALL)
    initial = tuple(layer.initial)
    with pytest.raises(ValueError, match="u = None"):
        memory_caching(x, x, x, None, initial, None, SMALL)
    with pytest.raises(ValueError, match="method = 'fast'"):
        memory_caching(x, x, x, x, initial, None, SMALL, method="fast")


def test_mc_torch_imports_without_jax():
    """The package runs if jax, flax, safetensors and transformers cannot be imported."""
    code = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "safetensors", "transformers"):
    sys.modules[name] = None
import torch
from mc_core import MCConfig
from mc_torch import MemoryCachingLayer
y = MemoryCachingLayer(MCConfig(8, 2, segment_size=4))(torch.ones(1, 9, 8))
assert y.shape == (1, 9, 8)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    sources = "".join(path.read_text() for path in (ROOT / "mc_torch").rglob("*.py"))
    assert "import jax" not in sources
    assert "from jax" not in sources
