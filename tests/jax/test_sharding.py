"""Meshes, and the shardings of parameters and batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_core.errors import UserError
from mc_jax import LanguageModel
from mc_jax.sharding import (
    AXES,
    RULES,
    axes_sharding,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)

LAYER = MCConfig(8, 2, memory=TitansConfig(norm="layer"), conv_width=2, gate_bias=1.0)
CONFIG = ModelConfig(vocab_size=7, num_layers=1, ffn_width=12, layer=LAYER, tie_embeddings=False)
SPECS = {
    "embed.embedding": (None, "fsdp"),
    "head.kernel": ("fsdp", None),
    "norm.scale": (None,),
    "ffn.up_proj.kernel": ("fsdp", "heads"),
    "ffn.down_proj.kernel": ("heads", "fsdp"),
    "mixer.q_proj.kernel": ("fsdp", "heads"),
    "mixer.out_proj.kernel": ("heads", "fsdp"),
    "mixer.q_conv.kernel": (None, "heads"),
    "mixer.coefficients.step.kernel": ("fsdp", "heads"),
    "mixer.coefficients.step.bias": ("heads",),
    "mixer.gate_bias": ("heads",),
    "mixer.initial.0": ("heads", None, None),
    "mixer.memory_norm.bias": ("heads", None),
    "mixer.output_norm.scale": ("heads", None),
}


def create() -> LanguageModel:
    return LanguageModel(CONFIG, rngs=nnx.Rngs(0))


def flat(state: nnx.State) -> dict[str, jax.Array]:
    state = nnx.to_flat_state(state)
    names = (".".join(map(str, path)) for path in state.paths)
    return {name: leaf.get_value() for name, leaf in zip(names, state.leaves, strict=True)}


def test_size_minus_one_fills_the_mesh():
    assert dict(make_mesh().shape) == dict(zip(AXES, (8, 1, 1, 1), strict=True))
    mesh = make_mesh(2, fsdp=-1)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "heads": 1, "context": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3,), "mesh = data=3: must have a product of 8, the number of CPU devices that JAX sees"),
        (
            (1, 1, 4),
            "heads=4: must have a product of 8, the number of CPU devices that JAX sees; got 4",
        ),
        ((-1, 3), "the product of the sizes without -1, 3, must be a divisor of 8"),
        ((-1, -1), "mesh = data=-1,fsdp=-1: must have -1 on at most one axis"),
        ((0,), "mesh.data = 0: must be >= 1, or -1 for what is left"),
    ],
)
def test_invalid_meshes_are_refused(sizes, message):
    with pytest.raises(UserError) as error:
        make_mesh(*sizes)
    assert message in str(error.value)


def test_parameters_are_created_sharded_by_the_table():
    mesh, abstract = make_mesh(2, 2, 2), nnx.eval_shape(create)
    shardings = parameter_shardings(abstract, mesh)
    state = jax.jit(lambda: nnx.state(create()), out_shardings=shardings)()
    whole = flat(nnx.state(create()))
    for name, x in flat(state).items():
        np.testing.assert_allclose(x, whole[name], atol=1e-6, err_msg=name)
    specs = {name: x.sharding.spec for name, x in flat(state).items()}
    for end, spec in SPECS.items():
        (found,) = (found for name, found in specs.items() if f".{name}".endswith(f".{end}"))
        assert found == PartitionSpec(*spec), end
    for name, x in flat(state).items():
        parts = [2 if axis else 1 for axis in specs[name]]
        local = x.addressable_shards[0].data.shape
        assert [size * part for size, part in zip(local, parts, strict=True)] == [*x.shape], name


def test_parameters_of_a_state_equal_those_of_its_model():
    mesh = make_mesh(2, 2, 2)
    model = nnx.eval_shape(create)
    assert parameter_shardings(nnx.state(model), mesh) == parameter_shardings(model, mesh)


def test_mesh_that_does_not_divide_heads_or_widths_is_refused():
    model = nnx.eval_shape(create)
    with pytest.raises(UserError, match="mesh heads = 4: must be a divisor of num_heads = 2"):
        parameter_shardings(model, make_mesh(data=2, heads=4))
    narrow = nnx.Dict(weight=nnx.Param(jax.ShapeDtypeStruct((6, 4), "float32"), axes=("embed",)))
    narrow.weight.set_metadata(axes=("embed", None))
    message = "mesh fsdp = 4: must be a divisor of 6, the size of the axis 'embed' of weight"
    with pytest.raises(UserError, match=message):
        parameter_shardings(narrow, make_mesh(data=2, fsdp=4))


def test_a_mesh_may_lack_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert batch_sharding(mesh).spec == PartitionSpec("data", None)
    assert axes_sharding(mesh, *RULES).spec == PartitionSpec("data", None, None, None, None)
    assert batch_sharding(make_mesh(2, 4)).spec == PartitionSpec(("data", "fsdp"), "context")


def test_stacked_layers_are_sharded_like_one():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return LanguageModel(CONFIG, rngs=rngs).blocks[0].ffn

    stacked = nnx.eval_shape(lambda: stack(nnx.Rngs(0)))
    spec = flat(parameter_shardings(stacked, make_mesh(2, 2, 2)))["up_proj.kernel"].spec
    assert spec == PartitionSpec(None, "fsdp", "heads")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("aggregation", "rule"),
    [
        ("ssc", "constant"),
        ("grm", "constant"),
        ("soup", "fenwick"),
        ("ssc", "logarithmic"),
    ],
)
def test_model_under_explicit_axes_equals_one_device(aggregation, rule):
    """`jax.make_mesh` makes such axes. Logits, gradients and a stream with its cache."""
    layer = dataclasses.replace(LAYER, aggregation=aggregation, segmentation=rule, segment_size=2)
    config = dataclasses.replace(CONFIG, layer=layer)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    tokens = np.random.default_rng(0).integers(7, size=(4, 7), dtype=np.int32)
    streams = rule != "logarithmic"

    def run(state: nnx.State, tokens: jax.Array) -> tuple:
        def loss(state: nnx.State) -> jax.Array:
            return jnp.mean(jnp.sin(nnx.merge(graphdef, state)(tokens)))

        model = nnx.merge(graphdef, state)
        logits, cache = model(tokens), ()
        if streams:
            logits, cache = model.extend(tokens, model.init_cache(len(tokens), 8))
        return *jax.value_and_grad(loss)(state), logits, cache

    expected = jax.jit(run)(state, tokens)
    mesh = jax.make_mesh((2, 2, 2), AXES[:3])
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with jax.set_mesh(mesh):
        split = jax.device_put(state, parameter_shardings(model, mesh))
        rows = jax.device_put(tokens, batch_sharding(mesh))
        found = jax.jit(run)(split, rows)
    assert found[2].sharding.spec == PartitionSpec(("data", "fsdp"), None, None)
    if streams:
        states = found[3][0].state.weights[0]
        assert states.sharding.spec[0] == ("data", "fsdp")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
