"""Training with tokens split over devices equals training on one device."""

import jax
import numpy as np
import pytest

from helpers.tiny_run import TINY
from mc_jax.sharding import split_rows
from train.config import TrainConfig, from_dict
from train.mesh import open_mesh
from train.step import TrainState, build

ROWS, TOKENS = 8, 32


def config_of(memory: str, mesh: dict[str, int], accumulation: int) -> TrainConfig:
    layer = {
        "memory": {"kind": memory},
        "segment_size": 4,
        "chunk_size": 4,
        "state_init_mode": "restart",
        "conv_width": 3,
    }
    model = TINY["model"] | {"layer": TINY["model"]["layer"] | layer, "remat": True}
    run = {"batch_size": ROWS // accumulation, "accumulation": accumulation, "mesh": mesh}
    data = {"corpus": "x", "window": TOKENS}
    return from_dict(TINY | {"data": data, "model": model, "run": TINY["run"] | run})


def train_two_steps(config: TrainConfig) -> tuple[list[float], TrainState]:
    _, state, step = build(config, open_mesh(config.run.mesh))
    shape = (config.run.accumulation, config.run.batch_size, TOKENS + 1)
    tokens = np.random.default_rng(0).integers(256, size=shape, dtype=np.int32)
    losses = []
    for _ in range(2):
        state, metrics = step(state, split_rows(tokens, state, axis=1))
        losses.append(float(metrics.loss))
    return losses, jax.tree.map(np.asarray, state)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "mesh",
    [{"context": 4}, {"data": 2, "context": 2}, {"fsdp": 2, "heads": 2, "context": 2}],
    ids=str,
)
def test_split_tokens_train_like_one_device(mesh, accumulation):
    losses, state = train_two_steps(config_of("linear", {"data": 1} | mesh, accumulation))
    expected, one = train_two_steps(config_of("linear", {"data": 1}, accumulation))
    np.testing.assert_allclose(losses, expected, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
