"""Layers of `mc_jax` as subjects: compiled outputs and gradients on a fixed batch."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.batch import batch
from bench.count import count_flops
from bench.timing import Subject
from mc_core.config import LayerConfig
from mc_core.weights import Flat, to_jax
from mc_jax.model import LAYERS
from mc_jax.pretrained import set_weights
from mc_jax.sharding import local, make_mesh, parameter_shardings, split_rows


def build(config: LayerConfig, flat: Flat | None = None, seed: int = 0) -> nnx.Module:
    """Return a float32 layer, with random weights or with weights in PyTorch's layout."""
    layer: nnx.Module = LAYERS[type(config)](config, rngs=nnx.Rngs(seed))
    if flat is not None:
        set_weights(layer, to_jax(flat))
    return layer


def subject(
    config: LayerConfig,
    rows: int,
    tokens: int,
    *,
    dtype: str = "float32",
    backward: bool = True,
    flat: Flat | None = None,
    seed: int = 0,
    name: str = "jax",
    devices: int = 1,
) -> Subject:
    """Return a compiled layer; `backward` adds the gradients of tokens and parameters.

    Args:
        config: configuration of the layer.
        rows: number of sequences.
        tokens: number of tokens per sequence.
        dtype: compute dtype; parameters are float32.
        backward: compute gradients.
        flat: weights in PyTorch's layout; None = random.
        seed: random seed of parameters and batch.
        name: name in tables.
        devices: local devices over which the batch is split.

    Raises:
        UserError: there are fewer devices, or they do not divide the batch.
    """
    layer = build(config, flat, seed)
    mesh = make_mesh(devices=local(devices, "--devices", rows))
    graphdef, params = nnx.split(layer)
    params = jax.device_put(params, parameter_shardings(layer, mesh))
    arrays = [jnp.asarray(a, dtype) for a in batch(config.d_model, rows, tokens, seed)]
    x, cotangent = split_rows(arrays, params)

    def forward(params: Any, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x)

    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(forward, params, x)
        return y, *pull(cotangent)

    args = (params, x, cotangent) if backward else (params, x)
    return compiled_subject(name, both if backward else forward, args, rows * tokens, dtype)


def compiled_subject(
    name: str, function: Any, args: tuple[Any, ...], tokens: int, dtype: str = "float32"
) -> Subject:
    """Compile a function, and return it as a subject with compile time, FLOPs and bytes.

    The function runs on the devices of its arguments.
    """
    devices = len(jax.tree.leaves(args)[0].devices())
    start = time.perf_counter(), time.process_time()
    compiled = jax.jit(function).lower(*args).compile()
    end = time.perf_counter(), time.process_time()
    memory: Any = compiled.memory_analysis()
    per_device = (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Subject(
        name=name,
        run=lambda: jax.block_until_ready(compiled(*args)),
        tokens=tokens,
        compile_s=end[0] - start[0],
        compile_processor_s=end[1] - start[1],
        flops=count_flops(function, *args),
        bytes=per_device * devices,  # the compiler's count is per device; all run the same program
        devices=devices,
        dtype=dtype,
    )
