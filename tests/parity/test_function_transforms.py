"""Function transforms: `torch.func`, `torch.vmap`, `jax.vmap` and `jax.jvp`.

Each is compared with ordinary backward passes per example.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp

import mc_jax
from helpers import jax_calls
from helpers.cases import AGGREGATIONS, KINDS, FunctionCase, assert_close, make_case
from helpers.covering_arrays import thinned
from helpers.torch_calls import arrays, leaves
from helpers.torch_layers import Extend
from mc_core import (
    AttentionConfig,
    DLAConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_torch import LanguageModel, chunked, memory_caching
from mc_torch.model import LAYERS as MIXERS
from mc_torch.numerics import tree_map

EXACT = 1e-9
BATCHED = ("q", "k", "v", "u", "coefficients")
Tree = Any

# PyTorch's forward mode still calls it.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


def small_case(memory: str, aggregation: str, **options: Any) -> FunctionCase:
    return make_case(
        memory, aggregation, tokens=6, segment_size=2, chunk_size=2, mask="some", **options
    )


def inputs_of(case: FunctionCase) -> tuple[dict[str, torch.Tensor], Callable[..., Any], list[str]]:
    """Return the tensors of a case, a function of them and the mask, and which are batched."""
    tree = arrays(case)
    names, number = [], iter(range(100))
    for name, part in tree.items():
        names += [name] * len(leaves(part))
    tensors = {
        f"{name}.{i}": leaf.detach()
        for i, (name, leaf) in enumerate(zip(names, leaves(tree), strict=True))
    }
    rows = [name for name in tensors if name.split(".")[0] in BATCHED]
    index = {name: tree_map(lambda _: next(number), part) for name, part in tree.items()}
    keys = list(tensors)

    def run(tensors: dict[str, torch.Tensor], mask: torch.Tensor, method: str = "chunked") -> Any:
        filled = {name: tree_map(lambda i: tensors[keys[i]], part) for name, part in index.items()}
        return memory_caching(**filled, config=case.config, mask=mask, method=method)

    return tensors, run, rows


def scalar(result: Any) -> torch.Tensor:
    return torch.sin(result.output).sum() + torch.sin(result.gates).sum()


def one_row(tensors: dict[str, torch.Tensor], rows: list[str], row: Any) -> dict[str, Any]:
    return {name: x[row] if name in rows else x for name, x in tensors.items()}


def autograd(loss: Callable[..., torch.Tensor], tree: dict[str, torch.Tensor], *rest: Any) -> Tree:
    """Return gradients of an ordinary backward pass; zeros if missing."""
    tree = {name: x.clone().requires_grad_() for name, x in tree.items()}
    grads = torch.autograd.grad(loss(tree, *rest), [*tree.values()], materialize_grads=True)
    return {name: x.detach() for name, x in zip(tree, grads, strict=True)}


def stacked(trees: list[Tree]) -> Tree:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def check_per_sample(case: FunctionCase, method: str = "chunked") -> None:
    tensors, run, rows = inputs_of(case)
    mask = torch.tensor(case.mask)

    def loss(tensors: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        return scalar(run(one_row(tensors, rows, None), mask[None], method))

    dims = {name: 0 if name in rows else None for name in tensors}
    actual = torch.vmap(grad(loss), in_dims=(dims, 0))(tensors, mask)
    loop = [autograd(loss, one_row(tensors, rows, i), mask[i]) for i in range(len(mask))]
    assert_close(actual, stacked(loop), EXACT)


@thinned(2, memory=KINDS, aggregation=AGGREGATIONS)
def test_per_sample_gradients_match_loop(memory, aggregation):
    check_per_sample(small_case(memory, aggregation))


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ("linear-normalized", {"pooling": "sum"}),
        ("titans-norm", {"state_init_mode": "restart", "segmentation": "logarithmic"}),
        ("swla", {"state_init_mode": "restart", "gate": "token"}),
        ("dla", {"use_q_as_u": True, "detach_cached_states": True, "detach_cached_context": True}),
    ],
)
def test_per_sample_gradients_under_other_options(memory, options):
    case = small_case(memory, "ssc", **options)
    check_per_sample(case._replace(u=None) if "use_q_as_u" in options else case)


@pytest.mark.parametrize(
    ("memory", "aggregation"),
    [("linear", "residual"), ("swla", "grm"), ("dla", "ssc"), ("titans", "soup")],
)
def test_per_sample_gradients_of_the_recurrent_method(memory, aggregation):
    check_per_sample(small_case(memory, aggregation), "recurrent")


@forward_mode
@pytest.mark.parametrize(("memory", "aggregation"), [("titans", "grm"), ("swla", "ssc")])
def test_torch_func_transforms_match_autograd(memory, aggregation):
    tensors, run, _ = inputs_of(small_case(memory, aggregation))
    mask = torch.tensor(small_case(memory, aggregation).mask)
    loss = lambda tensors: scalar(run(tensors, mask))  # noqa: E731
    expected = autograd(loss, tensors)
    assert_close(grad(loss)(tensors), expected, EXACT)
    value, pull = vjp(loss, tensors)
    assert_close(pull(torch.ones_like(value))[0], expected, EXACT)
    along = {name: torch.cos(x) for name, x in tensors.items()}
    slope = sum((expected[name] * along[name]).sum() for name in tensors)
    assert_close(jvp(loss, (tensors,), (along,))[1], slope, EXACT)

    key = tensors["k.1"][0, 1]

    def output(key: torch.Tensor) -> torch.Tensor:
        k = torch.where(torch.arange(2)[:, None, None, None] == 0, key, tensors["k.1"])
        return run(tensors | {"k.1": k}, mask).output[0, -1]

    assert_close(jacrev(output)(key), torch.autograd.functional.jacobian(output, key), EXACT)
    bent = lambda key: torch.sin(output(key)).sum()  # noqa: E731
    assert_close(hessian(bent)(key), torch.autograd.functional.hessian(bent, key), EXACT)


LAYERS: dict[str, Any] = {
    "titans": MCConfig(8, 2, TitansConfig(2, 2), segment_size=3, chunk_size=2, conv_width=3),
    "linear": MCConfig(8, 2, LinearConfig(), "residual", segment_size=3, chunk_size=2),
    "normalized": MCConfig(8, 2, LinearConfig(normalize=True), "soup", segment_size=3),
    "swla": MCConfig(8, 2, SWLAConfig(), "ssc", segment_size=3, gate="token"),
    "dla": MCConfig(8, 2, DLAConfig(2, 1), "mean", segment_size=3, state_init_mode="restart"),
    "attention": AttentionConfig(8, 2, conv_width=2),
    "window": AttentionConfig(8, 2, window=2),
    "log-linear": LogLinearConfig(8, 2, 4, chunk_size=2, conv_width=2),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    module: Any = MIXERS.get(type(config), LanguageModel)(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module, {name: x.detach() for name, x in module.named_parameters()}


def normal(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).standard_normal(shape))


@every_layer
def test_per_sample_gradients_of_a_layer(name):
    layer, params = build(LAYERS[name])
    x, mask = normal(3, 7, 8), torch.tensor(np.random.default_rng(1).random((3, 7)) < 0.8)

    def loss(params: Tree, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.sin(functional_call(layer, params, (x[None], mask[None]))).sum()

    actual = torch.vmap(grad(loss), in_dims=(None, 0, 0))(params, x, mask)
    loop = [autograd(loss, params, *row) for row in zip(x, mask, strict=True)]
    assert_close(actual, stacked(loop), EXACT)


@forward_mode
@every_layer
def test_forward_mode_of_layer_and_gradient(name):
    layer, params = build(LAYERS[name])
    x = normal(1, 7, 8)

    def loss(params: Tree) -> torch.Tensor:
        return torch.sin(functional_call(layer, params, (x,))).sum()

    along = {name: torch.cos(x) for name, x in params.items()}
    slope = lambda tree: sum((tree[name] * along[name]).sum() for name in tree)  # noqa: E731
    assert_close(jvp(loss, (params,), (along,))[1], slope(autograd(loss, params)), EXACT)
    # Hessian-vector products, forward over reverse and reverse over reverse.
    product = grad(lambda params: slope(grad(loss)(params)))(params)
    assert_close(jvp(grad(loss), (params,), (along,))[1], product, EXACT)


@every_layer
@torch.no_grad()
def test_streams_under_vmap_match_loop(name):
    layer, _ = build(LAYERS[name])
    x, padding = normal(2, 2, 8, 8), torch.tensor(np.random.default_rng(2).random((2, 2, 5)) < 0.3)
    cache = layer.init_cache(2, 8)

    def stream(x: torch.Tensor, padding: torch.Tensor, cache: Tree) -> Tree:
        first, cache = layer.extend(x[:, :5], cache, padding=padding)
        second, cache = layer.extend(x[:, 5:6], cache)
        return first, second, cache

    each = [stream(*row, cache) for row in zip(x, padding, strict=True)]
    shared = torch.vmap(stream, in_dims=(0, 0, None))(x, padding, cache)
    copied = tree_map(lambda leaf: torch.stack([leaf, leaf]), cache)
    own = torch.vmap(stream)(x, padding, copied)
    for i, expected in enumerate(each):
        assert_close(tree_map(lambda leaf: leaf[i], shared), expected, EXACT)  # noqa: B023
        assert_close(tree_map(lambda leaf: leaf[i], own), expected, EXACT)  # noqa: B023


@every_layer
def test_torch_func_stream_gradients(name):
    layer, params = build(LAYERS[name])
    x = normal(2, 8, 8)
    with torch.no_grad():
        _, cache = layer.extend(x[:, :5], layer.init_cache(2, 8))

    def loss(params: Tree) -> torch.Tensor:
        named = {f"layer.{name}": value for name, value in params.items()}
        return torch.sin(functional_call(Extend(layer), named, (x[:, 5:], cache))[0]).sum()

    assert_close(grad(loss)(params), autograd(loss, params), EXACT)


def test_full_cache_raises_under_grad_and_gives_nan_under_vmap():
    layer, _ = build(LAYERS["titans"])
    x, cache = normal(1, 3, 8), layer.init_cache(1, 2)
    with pytest.raises(ValueError, match="max_tokens = 2"):
        grad(lambda x: layer.extend(x, cache)[0].sum())(x)
    caches = tree_map(lambda leaf: leaf[None], cache)
    y, _ = torch.vmap(lambda x, cache: layer.extend(x, cache))(x[None], caches)
    assert torch.isnan(y).all()


@forward_mode
@pytest.mark.parametrize("remat", [False, True])
def test_per_sample_gradients_of_a_language_model(remat):
    layer = dataclasses.replace(LAYERS["titans"], aggregation="ssc")
    mixers = ("memory", "window", "attention")
    config = ModelConfig(11, 3, layer, mixers=mixers, attention_window=3, remat=remat)
    model, params = build(config)
    tokens = torch.tensor(np.random.default_rng(0).integers(11, size=(2, 8)))

    def loss(params: Tree, tokens: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, params, (tokens[None, :-1],))
        return torch.nn.functional.cross_entropy(logits[0], tokens[1:])

    actual = torch.vmap(grad(loss), in_dims=(None, 0))(params, tokens)
    assert_close(actual, stacked([autograd(loss, params, row) for row in tokens]), EXACT)


def saved_bytes(run: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass outside of checkpoints."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def test_backward_pass_recomputes_activations(monkeypatch):
    layer, _ = build(MCConfig(8, 2, TitansConfig(2, 2), segment_size=8, chunk_size=4))
    x = normal(2, 64, 8).requires_grad_()
    saved = saved_bytes(lambda: layer(x))
    calls = []
    write = chunked.write_chunk
    monkeypatch.setattr(chunked, "write_chunk", lambda *args: calls.append(1) or write(*args))
    y = layer(x)
    assert len(calls) == 16
    y.sum().backward()
    assert len(calls) == 32
    monkeypatch.setattr("mc_torch.chunked.remat", lambda function: function)
    monkeypatch.setattr("mc_torch.dense_reads.remat", lambda function: function)
    assert saved < 0.5 * saved_bytes(lambda: layer(x))


@pytest.mark.slow
@pytest.mark.usefixtures("float64", "strict")
def test_jax_per_sample_gradients_match_forward_mode():
    case = make_case("swla", "ssc", tokens=4, segment_size=2, chunk_size=2, mask="some")
    inputs, mask = jax_calls.arrays(case), jnp.asarray(case.mask)
    rows = {name: inputs.pop(name) for name in BATCHED}

    def loss(inputs: Tree, rows: Tree, mask: jax.Array) -> jax.Array:
        rows, mask = jax.tree.map(lambda x: x[None], (rows, mask))
        result = mc_jax.memory_caching(**inputs, **rows, config=case.config, mask=mask)
        return jnp.sum(jnp.sin(result.output))

    first = jax.tree.map(lambda x: x[0], rows)
    along = jax.tree.map(jnp.cos, (inputs, first))

    @jax.jit
    def run() -> Any:
        per_sample = jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(None, 0, 0))
        at_first = lambda inputs, first: loss(inputs, first, mask[0])  # noqa: E731
        forward = jax.jvp(at_first, (inputs, first), along)[1]
        return per_sample(inputs, rows, mask), forward

    gradients, forward = run()
    products = jax.tree.map(lambda g, a: jnp.sum(g[0] * a), gradients, along)
    assert_close(sum(jax.tree.leaves(products)), forward, EXACT)
