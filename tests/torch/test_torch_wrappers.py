"""PyTorch models with wrapped, adapted, quantized or replaced modules."""

import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mc_core import LinearConfig, MCConfig, ModelConfig, TitansConfig
from mc_core.weights import to_jax
from mc_torch import AttentionLayer, LanguageModel, MemoryCachingLayer, generate
from mc_torch.modules import Linear, project
from mc_torch.pretrained import get_weights, set_weights
from parity.files import read_state_dict

torch.set_num_threads(1)

LAYER = MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4, chunk_size=2, conv_width=2)
BARE = MCConfig(8, 2, LinearConfig(), segment_size=4, chunk_size=2, output_norm="none")
CONFIG = ModelConfig(
    vocab_size=11,
    num_layers=2,
    layer=LAYER,
    tie_embeddings=False,
    mixers=("memory", "attention"),
    ffn_width=8,
)
TOKENS = torch.arange(14).reshape(2, 7) * 5 % 11
PROMPTS = [[1, 2, 3], [4]]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "u_proj", "out_proj"]
PROJECTIONS += ["gate_proj", "up_proj", "down_proj", "head"]
# PyTorch warns that both will move to another package.
QUANTISES = pytest.mark.filterwarnings("ignore:torch.(ao.quantization is|quantize_per_tensor)")


def compiled(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


WRAPPERS = {
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "checkpointed": checkpoint_wrapper,
    "compiled and checkpointed": lambda module: compiled(checkpoint_wrapper(module)),
}


def make_model(config=CONFIG, dtype=torch.float32):
    """Build a model with fixed weights."""
    torch.manual_seed(0)
    return LanguageModel(config, dtype=dtype)


def wrap(model, part, wrapper):
    """Wrap the model or a part of each of its blocks."""
    if part == "model":
        return wrapper(model)
    for i, block in enumerate(model.blocks):
        if part == "blocks":
            model.blocks[i] = wrapper(block)
        else:
            block.mixer = wrapper(block.mixer)
    return model


def stream(module, x):
    """Return outputs and final cache of a stream of two calls."""
    cache = module.init_cache(len(x), 3)
    first, cache = module.extend(x[:, :3].contiguous(), cache)
    second, cache = module.extend(x[:, 3:].contiguous(), module.grow(cache, x.shape[1]))
    return torch.cat([first, second], dim=1), cache


@torch.no_grad()
def run_methods(model):
    """Return the results of all methods but `forward`."""
    return stream(model, TOKENS), model.inspect(TOKENS), list(generate(model, PROMPTS, 3))


@cache
def unwrapped_results():
    """Return the results of the model without wrappers."""
    return run_methods(make_model())


@pytest.mark.parametrize("part", ["blocks", "mixers", "model"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_modules_match_plain_modules(name, part):
    model = wrap(make_model(), part, WRAPPERS[name])
    actual = run_methods(model)
    torch.testing.assert_close(actual, unwrapped_results(), rtol=0, atol=0)
    (_, caches), (_, traces), _ = actual
    assert len(caches) == len(traces) == 2
    assert traces[1] is None


@pytest.mark.parametrize("remat", [False, True])
def test_wrapped_blocks_train_like_plain_blocks(remat):
    config = ModelConfig(**{**vars(CONFIG), "remat": remat})
    grads = []
    for model in (make_model(config), make_model(config)):
        if grads:
            wrap(wrap(model, "mixers", checkpoint_wrapper), "blocks", checkpoint_wrapper)
        model(TOKENS).sin().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


class Scaled(nn.Module):
    """A wrapper that scales the output of its module, and forwards other attributes."""

    def __init__(self, module, scale):
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, x):
        return self.scale * self.module(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@pytest.mark.parametrize(
    "path", ["head", "norm", *(f"blocks.0.mixer.{x}" for x in PROJECTIONS[:5])]
)
def test_replaced_modules_are_called(path):
    """Scaling the output of a linear map equals scaling its weight."""
    model, scaled = make_model(), make_model()
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, name, Scaled(getattr(parent, name), 2.0))
    with torch.no_grad():
        getattr(scaled.get_submodule(path), "scale" if name == "norm" else "weight").mul_(2)
    torch.testing.assert_close(run_methods(model), run_methods(scaled))


def test_replaced_embedding_with_tied_head():
    config = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    model, scaled = make_model(config), make_model(config)
    model.embed = Scaled(model.embed, 2.0)
    with torch.no_grad():
        scaled.embed.weight.mul_(2)
    torch.testing.assert_close(run_methods(model), run_methods(scaled))


def test_weight_names_exclude_wrappers(tmp_path):
    """In memory, and in the `state_dict` file of a run with compiled blocks."""
    plain, model = make_model(), make_model()
    wrap(wrap(model, "mixers", checkpoint_wrapper), "blocks", compiled)
    assert any("._orig_mod." in key for key in model.state_dict())
    torch.testing.assert_close(get_weights(model), get_weights(plain), rtol=0, atol=0)
    changed = {name: x + 1 for name, x in get_weights(plain).items()}
    set_weights(model, changed)
    torch.testing.assert_close(get_weights(model), changed, rtol=0, atol=0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    flat = read_state_dict(tmp_path / "weights.pt").flat
    assert flat.keys() == changed.keys()
    assert all((flat[name] == x.numpy()).all() for name, x in changed.items())
    torch.save(model.state_dict() | plain.state_dict(), tmp_path / "both.pt")
    both = read_state_dict(tmp_path / "both.pt").flat  # no name is guessed
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\._orig_mod\."):
        to_jax(both)


def test_linear_maps_are_nn_linear():
    model = make_model()
    found = {name.rpartition(".")[2] for name, x in model.named_modules() if type(x) is nn.Linear}
    assert found == set(PROJECTIONS)
    assert not any(name.endswith("_proj.bias") for name in model.state_dict())


def test_linear_map_draws_only_its_weight():
    torch.manual_seed(0)
    weight, after = Linear(64, 3).weight, torch.rand(1)
    torch.manual_seed(0)
    std = 64**-0.5 / 0.87962566103423978
    drawn = nn.init.trunc_normal_(torch.empty(3, 64), std=std, a=-2 * std, b=2 * std)
    assert torch.equal(weight, drawn)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("wrapper", [lambda module: module, checkpoint_wrapper])
@pytest.mark.parametrize("exact", [False, True])
def test_weights_are_cast_to_input_dtype(exact, wrapper):
    """Also for wrapped modules; `exact` rounds only the operands."""
    linear = Linear(64, 3)
    x = torch.randn(2, 1, 64, dtype=torch.bfloat16)
    rounded = x.float() @ linear.weight.bfloat16().float().T
    wrapped = wrapper(linear)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = project(wrapped, x, exact=exact)
        assert y.dtype == (torch.float32 if exact else torch.bfloat16)
        torch.testing.assert_close(y.float(), rounded, rtol=1e-6 if exact else 1e-2, atol=1e-6)
    y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


@QUANTISES
@pytest.mark.parametrize("layer", [LAYER, BARE], ids=["titans", "no other parameters"])
@pytest.mark.parametrize("tied", [False, True])
def test_dynamic_quantization_replaces_all_linear_maps(tied, layer):
    model = make_model(ModelConfig(**{**vars(CONFIG), "layer": layer, "tie_embeddings": tied}))
    maps = sum(isinstance(module, nn.Linear) for module in model.modules())
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    if tied:
        table = {nn.Embedding: torch.ao.quantization.float_qparams_weight_only_qconfig}
        small = torch.ao.quantization.quantize_dynamic(small, table)
        assert isinstance(small.embed, torch.ao.nn.quantized.Embedding)
    assert not any(type(module) is nn.Linear for module in small.modules())
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert sum(isinstance(module, kind) for module in small.modules()) == maps == 15 + (not tied)
    with torch.no_grad():
        plain = model(TOKENS)
        (logits, caches), (whole, _), tokens = run_methods(small)
    for found in (whole, logits):
        assert 0 < (found - plain).norm() < 0.2 * plain.norm()
    assert caches[0].state.weights[0].dtype == caches[1].keys.dtype == torch.float32
    assert torch.stack(tokens).shape == (3, 2)


@QUANTISES
def test_quantized_maps_accept_any_input_dtype():
    layer = MemoryCachingLayer(LAYER)
    small = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64):
            y = small(x.to(dtype))
            assert y.dtype == dtype
            assert (y.float() - layer(x)).norm() < 0.2 * y.float().norm()


def test_lora_wraps_every_projection():
    """Adapters change outputs, streams match full passes, and only adapters are trained."""
    import peft

    model = make_model(dtype=torch.float64)
    before = model(TOKENS)
    lora = peft.LoraConfig(r=2, target_modules=PROJECTIONS, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(model), lora)
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_A." in name
    }
    assert adapted == set(PROJECTIONS)
    logits = model(TOKENS)
    assert not torch.allclose(logits, before)
    logits.sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name
    actual = run_methods(model)
    torch.testing.assert_close(actual[0][0], logits.detach())
    merged = model.merge_and_unload()
    assert type(merged) is LanguageModel
    torch.testing.assert_close(run_methods(merged), actual)
    assert merged.state_dict().keys() == make_model().state_dict().keys()


def test_attention_has_no_trace():
    layer = AttentionLayer(CONFIG.block_layers[1])
    x = torch.randn(1, 3, 8)
    y, trace = layer._inspect(x, None)
    assert torch.equal(y, layer(x))
    assert trace is None
