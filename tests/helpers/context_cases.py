"""Layers and models with split tokens compared with one device; also run in a process of its own.

`python -m helpers.context_cases DATA CONTEXT` compares all cases on DATA × CONTEXT devices, and
prints a line per case with an error. Processes have their own number of devices.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from helpers.cases import AGGREGATIONS, MEMORIES, assert_close
from mc_core import MCConfig, ModelConfig
from mc_jax import LanguageModel, MemoryCachingLayer
from mc_jax.sharding import batch_sharding, make_mesh

OUTPUT, GRADIENT = 1e-10, 1e-9  # relative RMS errors in float64
WIDTH = 8


def layer_config(memory: str, aggregation: str = "grm", **fields: Any) -> MCConfig:
    fields = {"segment_size": 4, "chunk_size": 3, "state_init_mode": "restart"} | fields
    return MCConfig(WIDTH, 2, MEMORIES[memory], aggregation=aggregation, **fields)


def build(config: MCConfig | ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """Return the graph definition, and float64 parameters away from their initial values."""
    kind = LanguageModel if isinstance(config, ModelConfig) else MemoryCachingLayer
    model = kind(config, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
    graphdef, params = nnx.split(model, nnx.Param)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda p: p + 0.2 * rng.standard_normal(p.shape), params)


def inputs(config: MCConfig | ModelConfig, tokens: int, seed: int = 1) -> tuple[Any, ...]:
    """Return inputs of two rows, and a mask that hides a third of the tokens of the second one."""
    rng = np.random.default_rng(seed)
    mask = rng.random((2, tokens)) > 0.3
    mask[0] = True
    if isinstance(config, ModelConfig):
        return jnp.asarray(rng.integers(0, config.vocab_size, (2, tokens))), jnp.asarray(mask)
    return jnp.asarray(rng.standard_normal((2, tokens, WIDTH))), jnp.asarray(mask)


def program(graphdef: nnx.GraphDef) -> Any:
    """Return the jitted function (params, x, mask) -> (output, gradients)."""

    def loss(params: Any, x: Any, mask: Any) -> tuple[Any, Any]:
        y = nnx.merge(graphdef, params)(x, mask)
        return jnp.sum(jnp.sin(y + jnp.arange(y.shape[1], dtype=y.dtype)[None, :, None])), y

    def run(params: Any, x: Any, mask: Any) -> Any:
        wanted = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else (0,)
        gradient = jax.value_and_grad(loss, wanted, has_aux=True, allow_int=True)
        (_, y), grads = gradient(params, x, mask)
        return y, jax.tree.leaves(grads)

    return jax.jit(run)


def split_mesh(data: int, context: int) -> jax.sharding.Mesh:
    return make_mesh(data, context=context, devices=jax.devices()[: data * context])


def compare(config: MCConfig | ModelConfig, mesh: jax.sharding.Mesh, tokens: int) -> None:
    """Compare outputs and gradients on a mesh with those of one device."""
    graphdef, params = build(config)
    x, mask = inputs(config, tokens)
    run = program(graphdef)
    y, grads = run(params, x, mask)
    with jax.set_mesh(mesh):
        whole = NamedSharding(mesh, PartitionSpec())
        split = jax.device_put((x, mask), batch_sharding(mesh))
        found, found_grads = run(jax.device_put(params, whole), *split)
    assert_close(found, y, OUTPUT, name="output")
    assert_close(found_grads, grads, GRADIENT, name="gradient")


def cases() -> Iterator[MCConfig | ModelConfig]:
    """Yield layers of all memories, aggregations and segments, and models with each mixer."""
    for memory, aggregation in itertools.product(MEMORIES, AGGREGATIONS):
        carries = MEMORIES[memory].decay_only_transition
        options = [("constant", "restart")]
        options += [("fenwick", "restart"), ("constant", "checkpoint")] if carries else []
        options += [("fenwick", "checkpoint")] if carries else []
        for place, (segmentation, mode) in enumerate(options):
            yield layer_config(
                memory,
                aggregation,
                segmentation=segmentation,
                state_init_mode=mode,
                conv_width=3 * (place % 2),
                gate="token" if memory == "linear-elu" else "context",
                pooling="sum" if memory == "swla" else "mean",
                detach_cached_states=memory == "linear-normalized",
                gate_bias=0.5,
            )
    layer = layer_config("swla", state_init_mode="checkpoint", conv_width=2)
    model = ModelConfig(11, 3, layer, ffn_width=8, mixers=("memory", "window", "attention"))
    yield dataclasses.replace(model, attention_window=3, remat=True)
    layer = layer_config("titans", "soup", conv_width=2)
    yield dataclasses.replace(model, layer=layer, attention_window=20, tie_embeddings=False)


def main(data: int, context: int) -> None:
    jax.config.update("jax_num_cpu_devices", data * context)
    jax.config.update("jax_enable_x64", True)
    mesh = split_mesh(data, context)
    for config in cases():
        try:
            # Two blocks of two segments per device; a layer has one block of four.
            compare(config, mesh, 16 * context)
        except Exception as error:
            print(f"{config}: {type(error).__name__}: {error}", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
