"""`python -m tools.cpu_optimizations`: compare the `# perf(cpu):` optimizations with plain forms.

Prints the table of `docs/performance.md`. Both forms of an optimization are compiled and timed in
alternating runs.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from bench.timing import alternate, ratio
from mc_core import MCConfig
from mc_jax import gates, log_linear, numerics, sharding

Forms = tuple[Callable[[], Any], Callable[[], Any]]  # the plain form and ours


def random(*shape: int) -> jax.Array:
    """Return standard normal numbers [*shape]."""
    return jax.random.normal(jax.random.key(0), shape)


def compiled(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Return a call of the compiled function that waits for its result."""
    program = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def cores() -> Forms:
    """A batch of 4,096 products 64 x 64, on one device and with one device per core."""
    x = random(4096, 64, 64)
    devices = jax.local_devices()
    rows = sharding.axes_sharding(sharding.make_mesh(devices=devices), "batch")
    product = partial(jnp.einsum, "bij,bjk->bik")
    return compiled(product, x, x), compiled(product, *[jax.device_put(x, rows)] * 2)


def sort() -> Forms:
    """Sort of 65,536 memory indices below 64 with their rows."""
    rows, n = 65536, 64
    group = jax.random.randint(jax.random.key(0), (rows,), 0, n + 1)
    bits = (rows - 1).bit_length()

    def pairs(group: jax.Array) -> Any:
        order = jnp.argsort(group, stable=True)
        return group[order], order

    def combined(group: jax.Array) -> Any:
        key = jnp.sort(group << bits | jnp.arange(rows), stable=False)
        return key >> bits, key & ((1 << bits) - 1)

    return compiled(pairs, group), compiled(combined, group)


def gelu() -> Forms:
    """Exact GELU of 4 million numbers."""
    x = random(1 << 22)
    return compiled(partial(jax.nn.gelu, approximate=False), x), compiled(numerics.gelu, x)


def score_blocks() -> Forms:
    """Top 4 of 2,048 memories for 8,192 tokens and 4 heads, in blocks of 512 and of 64 tokens."""
    u, pools = random(1, 4, 8192, 32), random(1, 4, 2048, 32)
    segment = jnp.arange(8192)[None] // 4
    config = MCConfig(128, 4, aggregation="ssc", ssc_top_k=4)

    def select(block: int) -> Callable[[], Any]:
        with mock.patch.object(gates, "_MAX_SCORES", block * 2048):
            return compiled(partial(gates._select_in_blocks, config=config), u, pools, segment)

    return select(gates.SCORE_BLOCK), select(64)


def token_blocks() -> Forms:
    """Log-linear attention of 65,536 tokens and its gradient, as a whole and in blocks."""
    q, k, v = (random(1, 65536, 4, 64) for _ in range(3))
    level_weights, retention = jnp.ones((1, 65536, 4, 17)), jnp.full((1, 65536, 4), 0.99)

    def loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(log_linear.log_linear_attention(*inputs) ** 2)

    def attend(block: int) -> Callable[[], Any]:
        inputs = q, k, v, level_weights, retention
        with mock.patch.object(log_linear, "_BLOCK", block):
            return compiled(jax.grad(loss, argnums=range(5)), *inputs)

    return attend(65536), attend(log_linear._BLOCK)


def main() -> None:
    """Print one row per optimization: both medians in ms, and their ratios."""
    print("| function | plain, ms | ours, ms | ratio | ratio of CPU time |\n|---|---|---|---|---|")
    for forms in (cores, sort, score_blocks, token_blocks, gelu):
        plain, ours = forms()
        runs = 7 if forms is token_blocks else 31
        timings = alternate({"plain": plain, "ours": ours}, runs=runs)
        wall, processor = ratio(timings["plain"], timings["ours"])
        times = " | ".join(f"{timing.median * 1e3:.2f}" for timing in timings.values())
        print(f"| `{forms.__name__}` | {times} | {wall:.1f} | {processor:.1f} |", flush=True)


if __name__ == "__main__":
    sharding.request(os.cpu_count() or 1)
    main()
