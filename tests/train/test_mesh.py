"""Training on meshes of eight devices: equal to one device, with the least communication."""

import dataclasses
from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest

from helpers.collectives import Collective, collectives
from helpers.tiny_run import TINY
from mc_core.aggregations import AGGREGATIONS
from mc_core.memories import MEMORIES
from mc_jax.sharding import num_shards, split_rows
from train.config import TrainConfig, from_dict
from train.mesh import open_mesh
from train.step import TrainState, build

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "heads": {"data": 1, "heads": 8},
    "all": {"data": 2, "fsdp": 2, "heads": 2},
}
ROWS, TOKENS, WIDTH = 16, 16, 16
# A memory with an inner loop, and a top-k that would gather its scores if it were `lax.top_k`.
QUICK = ("titans", "ssc")


def config_of(memory: str, aggregation: str, mesh: str, accumulation: int) -> TrainConfig:
    is_mlp = "expansion" in {field.name for field in dataclasses.fields(MEMORIES[memory])}
    expansion = {"expansion": 1} if is_mlp else {}
    layer = TINY["model"]["layer"] | {
        "d_model": WIDTH,
        "num_heads": 8,
        "memory": {"kind": memory} | expansion,
        "aggregation": aggregation,
        "ssc_top_k": 5,
        "segment_size": 2,
        "chunk_size": 2,
    }
    run = {"batch_size": ROWS // accumulation, "accumulation": accumulation, "mesh": MESHES[mesh]}
    return from_dict(
        TINY
        | {
            "data": {"corpus": "x", "window": TOKENS},
            "model": TINY["model"] | {"layer": layer},
            # Small steps, because large ones enlarge differences of rounding.
            "optimizer": TINY["optimizer"] | {"learning_rate": 1e-3, "eps": 1e-3},
            "run": TINY["run"] | run,
        }
    )


@cache
def compiled(memory: str, aggregation: str, mesh: str, accumulation: int):
    """Return the initial state, the batch on the mesh, and the compiled step."""
    config = config_of(memory, aggregation, mesh, accumulation)
    opened = open_mesh(config.run.mesh)
    _, state, step = build(config, opened)
    shape = (accumulation, ROWS // accumulation, TOKENS + 1)
    tokens = np.random.default_rng(0).integers(256, size=shape, dtype=np.int32)
    batch = split_rows(tokens, state, axis=1)
    return state, batch, step.lower(state, batch).compile()


def copy(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x), x.sharding), state)


@cache
def train_three_steps(*case) -> tuple[list[float], TrainState]:
    """Return losses and gradient norms, and the state after the first and the last step."""
    state, batch, step = compiled(*case)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    state, metrics, states = copy(state), [], []
    for _ in range(3):
        state, found = step(state, batch)
        metrics += [float(found.loss), float(found.grad_norm)]
        states.append(jax.tree.map(np.asarray, state))
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    return metrics, states[0], states[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulation"), [("one", 2), ("all", 1), ("all", 2), ("heads", 1), ("heads", 2)]
)
def test_blocks_of_logits_train_like_one_device(monkeypatch, mesh, accumulation):
    monkeypatch.setattr("mc_jax.cross_entropy.MAX_LOGITS", 256 * TOKENS)
    state, batch, step = compiled.__wrapped__(*QUICK, mesh, accumulation)
    metrics = []
    for _ in range(2):
        state, found = step(state, batch)
        metrics += [float(found.loss), float(found.grad_norm)]
    expected, *_ = train_three_steps(*QUICK, "one", 1)
    np.testing.assert_allclose(metrics[::2], expected[:4:2], rtol=2e-6)
    np.testing.assert_allclose(metrics[1], expected[1], rtol=1e-4)


def assert_equal_training(memory: str, aggregation: str, mesh: str, accumulation: int) -> None:
    metrics, first, last = train_three_steps(memory, aggregation, mesh, accumulation)
    expected, one_first, one_last = train_three_steps(memory, aggregation, "one", 1)
    np.testing.assert_allclose(metrics[::2], expected[::2], rtol=2e-6)
    np.testing.assert_allclose(metrics[1], expected[1], rtol=1e-4)
    np.testing.assert_allclose(metrics[3::2], expected[3::2], rtol=5e-3)
    # After the first step, Adam's moments are multiples of the gradient and of its square.
    assert_close(first.optimizer, one_first.optimizer, 2e-4)
    start = compiled(memory, aggregation, "one", 1)[0].params
    changes = [jax.tree.map(np.subtract, state.params, start) for state in (last, one_last)]
    assert_close(*changes, 5e-2)


def assert_close(tree, expected, tolerance: float) -> None:
    """Compare arrays relative to the largest element of each."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


DATA, FSDP = (pytest.param(mesh, 2, marks=pytest.mark.slow) for mesh in ("data", "fsdp"))


@pytest.mark.parametrize(("mesh", "accumulation"), [DATA, FSDP, ("all", 1)])
def test_mesh_trains_like_one_device(mesh, accumulation):
    assert_equal_training(*QUICK, mesh, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_and_aggregation_trains_on_every_mesh(memory, aggregation, mesh, accumulation):
    assert_equal_training(memory, aggregation, mesh, accumulation)


def local_parameters(state: TrainState) -> Counter[int]:
    """Count the parameters by size on a device, whole along the width."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    shards = num_shards(mesh, "heads")
    sizes = [
        x.size // (shards if "heads" in jax.tree.leaves(tuple(x.sharding.spec)) else 1)
        for x in jax.tree.leaves(state.params)
    ]
    return Counter(sizes)


def reductions(found: list[Collective]) -> Counter[int]:
    """Count the reduced arrays by size, without scalars."""
    return Counter(x.size for x in found if x.kind == "all-reduce" and x.shape)


def activations(mesh: str, accumulation: int) -> Counter[int]:
    """Count the reductions of activations: of each block's two parts, forward and backward."""
    sizes = MESHES[mesh]
    rows = ROWS // accumulation // sizes["data"] // sizes.get("fsdp", 1)
    return Counter({rows * TOKENS * WIDTH: 4 * TINY["model"]["num_layers"]})


@pytest.mark.parametrize(("mesh", "accumulation"), [("data", 2), FSDP, ("all", 1)])
def test_each_gradient_is_reduced_once(mesh, accumulation):
    """In float32, after the sum over microbatches; tied embeddings under fsdp are reduced twice."""
    state, _, step = compiled(*QUICK, mesh, accumulation)
    found, expected = collectives(step), local_parameters(state)
    if accumulation == 1:
        expected += activations(mesh, accumulation) + Counter([256 * WIDTH])
    assert reductions(found) == expected
    assert {x.dtype for x in found if x.kind == "all-reduce"} <= {"f32", "pred"}
    assert not any(x.in_loop for x in found)


@pytest.mark.parametrize(("mesh", "accumulation"), [("data", 2), FSDP, ("all", 1)])
def test_only_parameters_are_gathered(mesh, accumulation):
    """No state, score or activation is; parameters once, along the width."""
    state, _, step = compiled(*QUICK, mesh, accumulation)
    found = collectives(step)
    gathered = Counter(x.size for x in found if x.kind == "all-gather")
    assert gathered <= local_parameters(state)
    assert bool(gathered) == ("fsdp" in MESHES[mesh])
    assert {x.kind for x in found} <= {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", [QUICK, ("linear", "grm"), ("swla", "soup"), ("delta", "mean")])
def test_heads_reduce_only_activations(case, accumulation):
    """Input gradients of q, k, v, u and coefficients are added before one reduction."""
    _, _, step = compiled(*case, "heads", accumulation)
    found = collectives(step)
    assert {x.kind for x in found} == {"all-reduce"}
    assert reductions(found) == activations("heads", accumulation)
    assert all(x.in_loop == (accumulation > 1) for x in found if x.shape)
