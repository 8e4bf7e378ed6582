"""No NaN on long sequences with write coefficients at the ends of their ranges (section 2)."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from helpers.cases import LAST
from mc_core import DeltaConfig, DLAConfig, LinearConfig, MCConfig, SWLAConfig, TitansConfig
from mc_jax import MemoryCachingLayer
from train.config import load_config
from train.loop import train

MEMORIES = {
    "linear": LinearConfig(coefficients="token"),
    "swla": SWLAConfig(),
    "dla": DLAConfig(),
    "titans": TitansConfig(),
    "delta": DeltaConfig(),
    "dla-last": DLAConfig(**LAST),
    "titans-last": TitansConfig(**LAST),
    "dla-orthogonal": DLAConfig(chunk_update="orthogonal"),
    "titans-orthogonal": TitansConfig(chunk_update="orthogonal"),
}
BIAS = 10.0  # the worst case in training


def biased(state: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the initial parameters, then all combinations of extreme coefficient biases."""
    yield "as it starts", state
    for signs in product((-BIAS, BIAS), repeat=len(names)):
        moved = jax.tree.map(lambda x: x, state)
        for name, bias in zip(names, signs, strict=True):
            old = moved["coefficients"][name]["bias"]
            moved["coefficients"][name]["bias"] = jnp.full_like(old, bias)
        yield ", ".join(f"{n} {b:+.0f}" for n, b in zip(names, signs, strict=True)), moved


def check(config: MCConfig, tokens: int, dtype: Any) -> None:
    """Run forward and backward for all combinations; report those that are not finite."""
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0), dtype=dtype)
    graph, state = nnx.split(layer, nnx.Param)
    rng = np.random.default_rng(0)
    x, cotangent = (
        jnp.asarray(rng.standard_normal((1, tokens, config.d_model)), dtype) for _ in range(2)
    )

    @jax.jit
    def run(values: Any) -> tuple[jax.Array, Any]:
        def loss(values: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            params = jax.tree.map(lambda x: x, state)
            nnx.replace_by_pure_dict(params, values)
            y = nnx.merge(graph, params)(x)
            return jnp.sum((y * cotangent).astype(jnp.float32)), y

        (_, y), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(values, x)
        return y, {"parameters": grads[0], "input": grads[1]}

    not_finite = []
    for case, values in biased(nnx.to_pure_dict(state), tuple(config.memory.ranges)):
        y, grads = run(values)
        assert y.dtype == dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path({"output": y, "gradient": grads}):
            if not np.isfinite(np.asarray(leaf, np.float32)).all():
                not_finite.append(f"{case}: {jax.tree_util.keystr(path)}")
    assert not not_finite, "not finite:\n" + "\n".join(not_finite)


def config(memory: str, aggregation: str, mode: str, segment: int, chunk: int) -> MCConfig:
    return MCConfig(
        32,
        2,
        MEMORIES[memory],
        aggregation,
        segment_size=segment,
        chunk_size=chunk,
        state_init_mode=mode,
    )


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
QUICK = {"titans": "float32"}


@pytest.mark.parametrize(
    ("memory", "dtype"),
    [
        pytest.param(memory, dtype, marks=[] if QUICK.get(memory) == name else pytest.mark.slow)
        for memory in MEMORIES
        for name, dtype in DTYPES.items()
    ],
)
def test_outputs_are_finite_at_coefficient_limits(memory, dtype):
    check(config(memory, "grm", "checkpoint", 256, 256), 1024, dtype)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("mode", ["checkpoint", "restart"])
@pytest.mark.parametrize("aggregation", ["grm", "soup", "ssc", "residual"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_outputs_are_finite_at_4096_tokens(memory, aggregation, mode, dtype):
    check(config(memory, aggregation, mode, 512, 256), 4096, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("memory", MEMORIES)
def test_outputs_are_finite_in_one_segment_of_4096_tokens(memory):
    check(config(memory, "none", "checkpoint", 4096, 256), 4096, jnp.float32)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("memory", MEMORIES)
def test_outputs_are_finite_at_65536_tokens(memory, dtype):
    """With orthogonal updates and momentum, gradients overflow if the memory is carried on."""
    restart = memory == "titans-orthogonal"
    mode, segment = ("restart", 4096) if restart else ("checkpoint", 65_536)
    check(config(memory, "none", mode, segment, 256), 65_536, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_finite_for_200_steps(dtype, tmp_path):
    """The training loop checks that losses, gradients and parameters are finite."""
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    words = {
        "data.window": 4096,
        "data.validation_bytes": 16384,
        "model.layer.segment_size": 512,
        "model.layer.chunk_size": 256,
        "run.dtype": dtype,
        "run.steps": 200,
        "run.batch_size": 1,
        "run.directory": tmp_path / "run",
    }
    report = train(
        load_config(demo, [f"{key}={value}" for key, value in words.items()]), Console(quiet=True)
    )
    assert report.bits_per_byte < 8  # better than a uniform guess
