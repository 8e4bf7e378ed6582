"""`mc bench model`: time of a training step, and its share of the peak matmul rate."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bench.ceilings import matrix_size, measure
from bench.count import count_flops
from bench.devices import DEVICES_NOTE
from bench.timing import WARM_CACHE_NOTE, alternate
from mc_core.tables import ResultTable, Row
from mc_jax.sharding import split_rows
from parity.environment import result_table


def run(
    config: Any,
    mesh: Mesh,
    build: Callable[[Any, Mesh], Any],
    losses: Callable[..., Any],
    runs: int,
) -> ResultTable:
    """Time the whole optimiser step on random tokens.

    Args:
        config: configuration of a training run.
        mesh: devices of the run.
        build: returns the graph definition, the initial state and the jitted training step.
        losses: (graph definition, parameters, rest, tokens) -> losses of a microbatch.
        runs: number of timed steps.
    """
    run, window = config.run, config.data.window
    devices = mesh.size
    graphdef, state, step = build(config, mesh)
    rng = np.random.default_rng(run.seed)
    shape = (run.accumulation, run.batch_size, window + 1)
    tokens = rng.integers(config.model.vocab_size, size=shape, dtype=np.int32)
    tokens = split_rows(tokens, state, axis=1)
    flops = count_flops(step, state, tokens)
    forward = count_flops(lambda *a: losses(graphdef, *a)[0], state.params, state.rest, tokens[0])
    needed = 3 * forward * run.accumulation
    start = time.perf_counter()
    compiled = step.lower(state, tokens).compile()
    compile_s = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    held_by_one = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    held = [state]

    def once() -> None:
        # The step donates its state.
        held[0], metrics = compiled(held[0], tokens)
        jax.block_until_ready((held[0], metrics))

    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    timing = alternate({"step": once}, runs)["step"]
    ceilings = measure(run.dtype).of(devices)
    trained = run.accumulation * run.batch_size * window
    row: Row = {
        "model": config.model.name,
        "parameters": f"{parameters:,}",
        "ms per step": 1e3 * timing.median,
        "spread": f"{timing.spread:.0%}",
        "processor ms": 1e3 * timing.processor_median,
        "tokens/s": trained / timing.median,
        "GFLOP": flops / 1e9,
        "floor ms": 1e3 * flops / ceilings.matmul,
        "MFU": f"{ceilings.share(needed, timing.median):.0%}",
        "MiB": devices * held_by_one / 2**20,
        "compile s": compile_s,
    }
    notes = [
        f"{run.accumulation} × {run.batch_size} × {window} tokens per step, {run.dtype}",
        f"MFU: three times the forward pass's products ({needed / 1e9:.3g} GFLOP) against "
        f"{ceilings.matmul / 1e9:.0f} GFLOP/s of a product of {matrix_size():,}² matrices",
    ]
    notes.append(WARM_CACHE_NOTE)
    if devices > 1:
        notes.append(f"{devices} {DEVICES_NOTE}; MiB are summed over them")
    return result_table("Training step", [row], notes)
