"""Compile time and temporary memory of training steps: scanned blocks, and blocks of logits.

    python -m tools.step_programs

Programs are compiled, not run. Blocks: linear memories with grm, width 256, 4 × 1,024 tokens,
float32, rematerialized, with AdamW. Logits: a vocabulary of 50,304, width 768, 8,192 tokens,
bfloat16; the gradients of the tokens and of the head.
"""

import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from mc_jax import cross_entropy
from mc_jax.numerics import einsum_f32
from train.config import from_dict
from train.optimizer import make_optimizer
from train.stacked import stack_blocks, stacking_of
from train.step import abstract_state, make_train_step

MIB = 2**20
ROWS, TOKENS, WIDTH = 4, 1_024, 256
BLOCKS = ((2, False), (8, False), (2, True), (8, True), (24, True))  # number, scanned
VOCABULARY, HEAD_WIDTH = 50_304, 768


def temporary(compiled: jax.stages.Compiled) -> float:
    """Return MiB of the temporary arrays of a program."""
    memory: Any = compiled.memory_analysis()
    return memory.temp_size_in_bytes / MIB


def compile_step(layers: int, scan: bool) -> tuple[float, float]:
    """Return processor seconds of the compilation, and MiB of temporary arrays."""
    layer = {
        "d_model": WIDTH,
        "num_heads": 4,
        "memory": {"kind": "linear"},
        "aggregation": "grm",
        "segment_size": 256,
        "conv_width": 4,
    }
    model = {"num_layers": layers, "scan_layers": scan, "layer": layer}
    config = from_dict(
        {
            "data": {"corpus": "x", "window": TOKENS},
            "model": {"vocab_size": 256, "remat": True} | model,
            "optimizer": {"warmup_steps": 1},
            "run": {"steps": 10, "batch_size": ROWS},
        }
    )
    graphdef, state = abstract_state(config)
    state = stack_blocks(state, stacking_of(config.model))
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    step: Any = make_train_step(graphdef, optimizer)
    lowered = step.lower(state, jax.ShapeDtypeStruct((1, ROWS, TOKENS + 1), jnp.int32))
    start = time.process_time()
    compiled = lowered.compile()
    seconds = time.process_time() - start
    return seconds, temporary(compiled)


def compile_loss(max_logits: int) -> float:
    """Return MiB of temporary arrays of the loss's gradient."""

    def project(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return einsum_f32("btd,ds->bts", x, kernel, dtype=x.dtype)

    def loss(kernel: jax.Array, x: jax.Array, labels: jax.Array) -> jax.Array:
        scores = cross_entropy.label_scores(Partial(project, kernel), x, labels, VOCABULARY)
        return scores.losses.mean()

    shapes = [
        jax.ShapeDtypeStruct((HEAD_WIDTH, VOCABULARY), jnp.float32),
        jax.ShapeDtypeStruct((8, 1_024, HEAD_WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, 1_024), jnp.int32),
    ]
    with mock.patch.object(cross_entropy, "MAX_LOGITS", max_logits):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    return temporary(compiled)


def main() -> None:
    """Print the measurements."""
    for layers, scan in BLOCKS:
        seconds, size = compile_step(layers, scan)
        form = "scanned" if scan else "unrolled"
        print(f"{layers} {form} blocks: {seconds:.1f} processor s, {size:,.0f} MiB", flush=True)
    print(f"input of a block: {ROWS * TOKENS * WIDTH * 4 / MIB:.0f} MiB")
    for name, limit in (("all logits", 2**62), ("blocks of logits", cross_entropy.MAX_LOGITS)):
        print(f"{name}: {compile_loss(limit):,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
