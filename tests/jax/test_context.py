"""Sequences split over the mesh axis `context` give the results of one device."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers.cases import assert_close
from helpers.context_cases import OUTPUT, build, compare, inputs, layer_config, program, split_mesh
from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_core.memories import MEMORIES
from mc_jax import LanguageModel, MemoryCachingLayer
from mc_jax.context import TokenSplit, from_paired, paired_split, to_paired
from train.planning.hlo import Costs, in_loops, measure, parse

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=11,
    num_layers=3,
    layer=layer_config("swla", "grm", state_init_mode="checkpoint", conv_width=2),
    ffn_width=8,
    mixers=("memory", "window", "attention"),
    attention_window=3,
)

pytestmark = pytest.mark.usefixtures("float64", "strict")


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("memory", "window"), ("attention",)])
def test_split_model_matches_one_device(mixers):
    """Checkpointed states, a convolution, a window; batch and tokens are split."""
    model = dataclasses.replace(MODEL, num_layers=len(mixers), mixers=mixers)
    compare(model, split_mesh(2, 2), 32)


@pytest.mark.parametrize(
    "config",
    [
        layer_config("linear", "ssc", segmentation="fenwick", gate_bias=0.5),
        pytest.param(layer_config("titans", "soup"), marks=pytest.mark.slow),
        pytest.param(layer_config("linear-normalized", "grm"), marks=pytest.mark.slow),
    ],
    ids=lambda config: f"{config.memory.kind}-{config.aggregation}",
)
def test_split_layer_matches_one_device(config):
    compare(config, split_mesh(1, 4), 32)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "context"), [(1, 2), (1, 8), (2, 4)])
def test_every_memory_and_aggregation_matches_one_device(data, context):
    """All memories, aggregations, segmentations and start modes, on 2 or 8 devices."""
    command = [sys.executable, "-m", "helpers.context_cases", str(data), str(context)]
    paths = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("segmentation", ["constant", "fenwick"])
def test_split_prefill_can_be_extended(segmentation):
    """The cache after a split sequence is that of one device, and streams go on from it."""
    config = layer_config("linear", segmentation=segmentation, conv_width=3)
    graphdef, params = build(config)
    x, mask = inputs(config, 32)
    prefill = jax.jit(lambda p, x, m: nnx.merge(graphdef, p).forward_with_cache(x, m))
    y, cache = prefill(params, x, mask)
    with jax.set_mesh(split_mesh(1, 4)):
        split, split_cache = prefill(params, x, mask)
    assert_close(split, y, OUTPUT, name="output")
    assert_close(jax.device_get(split_cache), jax.device_get(cache), OUTPUT, name="cache")


@pytest.mark.parametrize(
    "devices", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 4))]
)
def test_paired_order_is_a_permutation_that_can_be_undone(devices):
    split = TokenSplit(devices, paired=True)
    mesh = split_mesh(1, devices)
    tokens = 6 * devices
    x = jnp.arange(2 * tokens).reshape(2, tokens)
    with jax.set_mesh(mesh):
        paired = to_paired(x, split)
        back = from_paired(paired, split)
    np.testing.assert_array_equal(paired, x[:, split.positions(tokens)])
    np.testing.assert_array_equal(back, x)


def test_paired_split_needs_two_whole_blocks_per_device():
    def devices(config: ModelConfig, tokens: int) -> TokenSplit | None:
        with jax.set_mesh(split_mesh(1, 4)):
            return paired_split(config, tokens)

    assert devices(MODEL, 64) == TokenSplit(4, paired=True)
    assert devices(MODEL, 48) is None
    assert devices(dataclasses.replace(MODEL, attention_window=10), 64) is None
    assert paired_split(MODEL, 64) is None


def costs(
    config: ModelConfig, tokens: int, mesh: jax.sharding.Mesh | None, backward: bool
) -> Costs:
    """Return the costs of the compiled forward, or forward and backward pass on one device."""
    graphdef, params = build(config)
    run, arguments = program(graphdef), inputs(config, tokens)
    if not backward:
        run = jax.jit(lambda params, x, mask: nnx.merge(graphdef, params)(x, mask))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return measure(parse(run.lower(params, *arguments).compile().as_text()))


@pytest.mark.parametrize(
    ("memory", "segmentation"),
    [("titans", "constant"), ("linear", "constant"), ("linear", "fenwick")],
)
@pytest.mark.parametrize("aggregation", ["ssc", "grm"])
@pytest.mark.slow
def test_devices_share_the_work_evenly(memory, segmentation, aggregation):
    """At most 1.15 times the FLOPs of one device, divided by the number of devices."""
    layer = MCConfig(
        32,
        2,
        MEMORIES[memory](),
        aggregation=aggregation,
        segmentation=segmentation,
        segment_size=64,
        chunk_size=16,
        state_init_mode="restart",
    )
    model, tokens, devices = ModelConfig(11, 1, layer, ffn_width=32), 1024, 4
    alone = costs(model, tokens, None, backward=True)
    split = costs(model, tokens, split_mesh(1, devices), backward=True)
    assert split.flops <= 1.15 * alone.flops / devices


@pytest.mark.parametrize(
    ("aggregation", "backward"),
    [
        ("grm", False),
        pytest.param("grm", True, marks=pytest.mark.slow),
        pytest.param("ssc", True, marks=pytest.mark.slow),
    ],
)
def test_devices_gather_only_memories(aggregation, backward):
    """One gather of n states and pooled keys, its transpose, and none inside of a loop."""
    layer = MCConfig(
        32, 2, aggregation=aggregation, segment_size=64, chunk_size=16, state_init_mode="restart"
    )
    model, tokens, devices = ModelConfig(11, 1, layer, ffn_width=32), 1024, 4
    alone = costs(model, tokens, None, backward)
    split = costs(model, tokens, split_mesh(1, devices), backward)
    limit = 1.15 if layer.rule.sparse else 1.001
    assert split.flops <= limit * alone.flops / devices
    assert not list(in_loops(split))
    gathered = {c.result for c in split.collectives if c.kind == "all-gather"}
    rows, heads, width, segments = 2, 2, 16, tokens // 64
    memories = rows * segments * heads * (width * width + width) * 8
    assert memories in gathered
    assert all(size <= 8 * rows * tokens for size in gathered - {memories})  # ids and mask
    scattered = [c.result for c in split.collectives if c.kind == "reduce-scatter"]
    assert scattered == [memories / devices] * backward
    moved = [c.result for c in split.collectives if c.kind == "collective-permute"]
    # Only ids, the mask and the model's output change their order.
    assert max(moved) <= rows * tokens // (2 * devices) * 32 * 8


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        (
            layer_config("linear"),
            24,
            "tokens = 24: must be a multiple of context * segment_size = 16 on a mesh with "
            "context = 4: pad the sequence and mask the padding",
        ),
        (
            MCConfig(8, 2, TitansConfig(expansion=1), segment_size=4),
            32,
            "state_init_mode = 'checkpoint': must be 'restart' for a titans memory on a mesh with "
            "context = 4, because its writes depend on the memory before them",
        ),
        (
            layer_config("linear", segmentation="logarithmic"),
            32,
            "segmentation = 'logarithmic': must be 'constant' or 'fenwick' on a mesh with context",
        ),
        (
            layer_config("linear", conv_width=12, segment_size=2),
            32,
            "tokens = 32: must be >= 44 on a mesh with context = 4, because the first token of a "
            "block uses 11 tokens before it",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:segmentation")
def test_layers_that_cannot_be_split_are_refused(config, tokens, message):
    layer = nnx.eval_shape(lambda: MemoryCachingLayer(config, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
    with jax.set_mesh(split_mesh(1, 4)), pytest.raises(ValueError, match=re.escape(message)):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)


def test_log_linear_attention_is_refused_by_name():
    config = dataclasses.replace(MODEL, mixers=("log_linear",))
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    message = "mixer 'log_linear': cannot split sequences over a mesh with context = 4"
    with jax.set_mesh(split_mesh(1, 4)), pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model, ids: model(ids), model, ids)
