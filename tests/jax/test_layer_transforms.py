"""The layer under JAX and Flax transforms, and on four devices."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from helpers import torch_calls
from helpers.cases import assert_close, make_case
from helpers.jax_calls import arrays, call
from mc_core import LinearConfig, MCConfig, SWLAConfig, TitansConfig
from mc_jax import MemoryCachingLayer, memory_caching
from mc_torch.numerics import tree_map

pytestmark = pytest.mark.usefixtures("float64", "strict")
EXACT, GRADIENT = 1e-10, 1e-9
CONFIGS = {
    "titans": MCConfig(8, 2, TitansConfig(2, 2), "grm", segment_size=4, chunk_size=3),
    "swla": MCConfig(
        8, 2, SWLAConfig(), "ssc", segment_size=4, chunk_size=3, state_init_mode="restart",
        gate="token",
    ),
    "linear": MCConfig(
        8, 2, LinearConfig(normalize=True), "soup", segment_size=4, conv_width=3, gate="token"
    ),
}  # fmt: skip


def make_layer(name: str, seed: int = 0) -> MemoryCachingLayer:
    return MemoryCachingLayer(CONFIGS[name], rngs=nnx.Rngs(seed), param_dtype=jnp.float64)


def tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((*shape, 10, 8)))


def value_and_grads(layer: MemoryCachingLayer, x: jax.Array) -> Any:
    """Return the output, and the gradients of parameters and input."""
    graph, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(graph, state)(x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x)
    return y, (nnx.to_pure_dict(grads[0]), grads[1])


@pytest.mark.slow
def test_jit_matches_eager():
    """Uses the smallest layer: without `jit` each operation is compiled separately."""
    config = MCConfig(8, 2, LinearConfig(), segment_size=4)
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    x = tokens(1)[:, :7]
    assert_close(jax.jit(lambda x: layer(x))(x), layer(x), EXACT)


@pytest.mark.parametrize(
    "name", ["swla", *(pytest.param(n, marks=pytest.mark.slow) for n in ("titans", "linear"))]
)
def test_vmap_matches_loop(name):
    layer, x = make_layer(name), tokens(2, 2)
    each = jax.jit(lambda x: layer(x))
    assert_close(jax.jit(jax.vmap(lambda x: layer(x)))(x), jnp.stack([each(y) for y in x]), EXACT)


@pytest.mark.slow
def test_vmap_of_memory_caching():
    """Coefficients, masks and initial memories are also mapped."""
    case = make_case("titans", "ssc", tokens=7, mask="some", segment_size=3)
    inputs, mask = arrays(case), jnp.asarray(case.mask)
    doubled = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), inputs)
    masks = jnp.stack([mask, ~mask])
    run = lambda x, mask: memory_caching(**x, config=case.config, mask=mask)  # noqa: E731
    both = jax.jit(jax.vmap(run))(doubled, masks)
    one = jax.jit(run)
    for i in range(2):
        expected = one(jax.tree.map(lambda x: x[i], doubled), masks[i])  # noqa: B023
        assert_close(jax.tree.map(lambda x: x[i], both), expected, EXACT)  # noqa: B023


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("titans", marks=pytest.mark.slow), "linear"])
def test_checkpoint_preserves_values_and_gradients(name):
    layer, x = make_layer(name), tokens(2)
    graph, state = nnx.split(layer)

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        run = jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))
        return jnp.sum(jnp.sin(run(state, x)))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, x)
    expected = value_and_grads(layer, x)[1]
    assert_close((nnx.to_pure_dict(grads[0]), grads[1]), expected, GRADIENT)


@pytest.fixture
def flax_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run in NNX's graph mode (True), or in tree mode (False)."""
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        assert nnx.set_graph_mode.current_value() == request.param
        yield


both_flax_modes = pytest.mark.parametrize(
    "flax_mode",
    [pytest.param(True, id="graph"), pytest.param(False, id="tree", marks=pytest.mark.slow)],
    indirect=True,
)


@both_flax_modes
def test_nnx_transforms(flax_mode):
    layer, x = make_layer("linear"), tokens(2)
    y, (expected, _) = value_and_grads(layer, x)
    assert_close(nnx.jit(lambda m, x: m(x))(layer, x), y, EXACT)
    grads = nnx.jit(nnx.grad(lambda m, x: jnp.sum(jnp.sin(nnx.remat(lambda m, x: m(x))(m, x)))))
    leaves = jax.tree.leaves(nnx.state(grads(layer, x)))
    assert_close(leaves, jax.tree.leaves(expected), GRADIENT)


@pytest.mark.slow
@both_flax_modes
def test_scan_over_layers(flax_mode):
    """Layers built by `nnx.vmap` and run by `nnx.scan` match a loop."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> MemoryCachingLayer:
        return MemoryCachingLayer(CONFIGS["titans"], rngs=rngs, param_dtype=jnp.float64)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: MemoryCachingLayer) -> jax.Array:
        return x + nnx.remat(lambda m, x: m(x))(layer, x)

    stack, x = build(nnx.Rngs(0)), tokens(2)
    y = nnx.jit(run)(x, stack)
    graph, state = nnx.split(stack)
    one = jax.jit(lambda state, x: x + nnx.merge(graph, state)(x))
    for i in range(3):
        x = one(jax.tree.map(lambda p: p[i], state), x)  # noqa: B023
    assert_close(y, x, EXACT)


@pytest.mark.slow
def test_linen_bridge():
    module = nnx.bridge.to_linen(MemoryCachingLayer, CONFIGS["swla"], param_dtype=jnp.float64)
    x = tokens(2)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    y = jax.jit(module.apply)(variables, x)
    assert y.shape == x.shape
    shapes = lambda tree: sorted(p.shape for p in jax.tree.leaves(tree))  # noqa: E731
    layer = make_layer("swla")
    assert shapes(variables["params"]) == shapes(nnx.state(layer, nnx.Param))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, x)))))(
        variables["params"]
    )
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(grads))
    # NNX and Linen have the same parameters.
    nnx.update(layer, nnx.State(nn.meta.unbox(variables["params"])))
    assert_close(jax.jit(lambda x: layer(x))(x), y, EXACT)


@pytest.fixture
def mesh() -> Iterator[jax.sharding.Mesh]:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("titans", marks=pytest.mark.slow), "swla"])
def test_sharded_layer_matches_single_device(name, mesh):
    """Batch sharding preserves values and gradients."""
    layer, x = make_layer(name), tokens(8)
    expected = value_and_grads(layer, np.asarray(x))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    y, grads = value_and_grads(layer, sharded)
    assert len(y.sharding.device_set) == 4
    assert not y.sharding.is_fully_replicated
    assert_close((y, grads), expected, GRADIENT)


@pytest.mark.parametrize(
    ("memory", "aggregation", "method"),
    [
        pytest.param("titans", "grm", "chunked", marks=pytest.mark.slow),
        ("swla", "ssc", "chunked"),
        pytest.param("dla", "soup", "recurrent", marks=pytest.mark.slow),
    ],
)
def test_shard_map_matches_single_device(memory, aggregation, method, mesh):
    """The initial state of every scan is sharded like its inputs.

    Values and gradients match PyTorch on one device.
    """
    case = make_case(memory, aggregation, batch=4, tokens=7, segment_size=3)
    inputs = arrays(case)
    batched, whole = PartitionSpec("data"), PartitionSpec()
    specs = {name: jax.tree.map(lambda _: batched, x) for name, x in inputs.items()}
    specs |= {name: jax.tree.map(lambda _: whole, inputs[name]) for name in ("initial", "norm")}
    run = lambda inputs: call(inputs, case, method).output  # noqa: E731
    mapped = jax.shard_map(run, in_specs=(specs,), out_specs=batched)
    loss = lambda x: (lambda y: (jnp.sum(jnp.sin(y)), y))(mapped(x))  # noqa: E731
    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    alone = torch_calls.arrays(case)
    expected = torch_calls.call(alone, case, method).output
    expected.sin().sum().backward()
    assert_close(y, expected.detach(), EXACT)
    expected_grads = {name: tree_map(lambda x: x.grad, tree) for name, tree in alone.items()}
    assert_close(grads, expected_grads, GRADIENT)
