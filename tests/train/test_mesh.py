"""Training on meshes of eight devices: equal to one device, with the least communication."""

import dataclasses
import math
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tiny_run import TINY
from mc_core.aggregations import AGGREGATIONS
from mc_core.memories import MEMORIES
from mc_jax.sharding import split_rows
from train.config import TrainConfig, from_dict
from train.mesh import open_mesh
from train.planning.hlo import measure, parse
from train.step import TrainState, build

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "rows": {"data": 2, "fsdp": 4},
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


@lru_cache(maxsize=8)  # compiled programs use memory maps, and a process is limited to 65,530
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


@lru_cache(maxsize=8)
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
    # After the first step, Adam's moments are multiples of the gradient and of its square, which
    # has twice the relative error.
    moments, one_moments = (state.optimizer[1][0] for state in (first, one_first))
    assert_close(moments.mu, one_moments.mu, 1.5e-4)
    assert_close(moments.nu, one_moments.nu, 3e-4)
    start = compiled(memory, aggregation, "one", 1)[0].params
    changes = [jax.tree.map(np.subtract, state.params, start) for state in (last, one_last)]
    assert_close(*changes, 5e-2)


def assert_close(tree, expected, tolerance: float) -> None:
    """Compare arrays relative to the largest element of each."""
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


CASES = [("data", 2), ("all", 1)]
SLOW_CASES = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("fsdp", 1), ("fsdp", 2), ("rows", 1), ("rows", 2), ("all", 2))
]


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [("all", 1), pytest.param("data", 2, marks=pytest.mark.slow), *SLOW_CASES],
)
def test_mesh_trains_like_one_device(mesh, accumulation):
    assert_equal_training(*QUICK, mesh, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("mesh", list(MESHES)[1:])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_every_memory_and_aggregation_trains_on_every_mesh(memory, aggregation, mesh, accumulation):
    assert_equal_training(memory, aggregation, mesh, accumulation)


def instructions(step: jax.stages.Compiled) -> Counter[str]:
    """Count the instructions of a program by operation, shape and layout."""
    return Counter(re.findall(r"= (\S+ [a-z-]+)\(", step.as_text()))


def plain_gradients(sum_losses, weight_of, shardings):
    """Return a function like that of `make_gradients`, without meshes."""

    def gradients(params, rest, batch):
        weights = jax.vmap(weight_of)(batch) * len(batch)

        def add(carry, inputs):
            def loss_of(params, rest):
                loss, rest = sum_losses(params, rest, inputs[0])
                return loss / inputs[1], rest

            total, gradient, rest = carry
            (loss, rest), new = jax.value_and_grad(loss_of, has_aux=True)(params, rest)
            return (total + loss, jax.tree.map(jnp.add, gradient, new), rest), None

        first = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), rest)
        return jax.lax.scan(add, first, (batch, weights))[0]

    return gradients


def test_one_device_runs_the_program_without_a_mesh(monkeypatch):
    """The step of a mesh of one device has no constraint, copy or other instruction more."""
    monkeypatch.setattr("train.step.make_gradients", plain_gradients)
    _, state, step = build(config_of(*QUICK, "one", 1))
    expected = step.lower(state, np.zeros((1, ROWS, TOKENS + 1), np.int32)).compile()
    monkeypatch.undo()
    assert instructions(compiled(*QUICK, "one", 1)[2]) == instructions(expected)


class Communicated(NamedTuple):
    """An array that a program communicates; a collective may have several."""

    kind: str
    dtype: str
    shape: tuple[int, ...]  # of the result on one device
    in_loop: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def communicated(*case) -> list[Communicated]:
    costs = measure(parse(compiled(*case)[2].as_text()))
    return [
        Communicated(c.kind, dtype, shape, c.in_loop)
        for c in costs.collectives
        for dtype, shape in c.results
    ]


def sizes_of(found: list[Communicated], kind: str) -> Counter[int]:
    """Count the arrays by size, without scalars."""
    return Counter(x.size for x in found if x.kind == kind and x.shape)


def split_parameters(*case) -> tuple[Counter[int], Counter[int]]:
    """Count the parameters by size on a device: with a width that is sharded, whole, and others."""
    with_width, others = Counter(), Counter()
    for x in jax.tree.leaves(compiled(*case)[0].params):
        axes = jax.tree.leaves(tuple(x.sharding.spec))
        sizes = {axis: x.sharding.mesh.shape[axis] for axis in axes}
        size = x.size // sizes.get("heads", 1)
        (with_width if sizes.get("fsdp", 1) > 1 else others)[size] += 1
    return with_width, others


def divided(sizes: Counter[int], parts: int) -> Counter[int]:
    return Counter({size // parts: count for size, count in sizes.items()})


def activations(mesh: str, accumulation: int) -> Counter[int]:
    """Count the reductions of activations: of each block's two parts, forward and backward."""
    sizes = MESHES[mesh]
    if sizes.get("heads", 1) == 1:
        return Counter()
    rows = ROWS // accumulation // sizes["data"] // sizes.get("fsdp", 1)
    return Counter({rows * TOKENS * WIDTH: 4 * TINY["model"]["num_layers"]})


@pytest.mark.parametrize(("mesh", "accumulation"), [*CASES, *SLOW_CASES])
def test_each_gradient_is_reduced_once(mesh, accumulation):
    """In float32, after the sum over microbatches; only the parts that a device holds."""
    found = communicated(*QUICK, mesh, accumulation)
    with_width, others = split_parameters(*QUICK, mesh, accumulation)
    parts = MESHES[mesh].get("fsdp", 1)
    assert sizes_of(found, "reduce-scatter") == divided(with_width, parts)
    copied = divided(with_width, parts) if MESHES[mesh]["data"] > 1 else Counter()
    expected = copied + others + activations(mesh, accumulation)
    assert sizes_of(found, "all-reduce") == expected
    assert {x.dtype for x in found if "reduce" in x.kind} <= {"f32", "pred"}


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_bfloat16_parameters_are_reduced_in_float32(accumulation):
    """XLA for CPUs has no reduction in bfloat16, so only the program that it is given shows it."""
    config = config_of(*QUICK, "rows", accumulation)
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, param_dtype="bfloat16")
    )
    _, state, step = build(config, open_mesh(config.run.mesh))
    tokens = np.zeros((accumulation, config.run.batch_size, TOKENS + 1), np.int32)
    text = step.lower(state, split_rows(tokens, state, axis=1)).as_text()
    sums = r'"stablehlo\.(all_reduce|reduce_scatter)".*\s+\^bb0\(%\w+: tensor<(\w+)>'
    reduced = set(re.findall(sums, text))
    assert reduced == {("all_reduce", "f32"), ("reduce_scatter", "f32")}


@pytest.mark.parametrize(("mesh", "accumulation"), [*CASES, *SLOW_CASES])
def test_only_parameters_are_gathered(mesh, accumulation):
    """No state, score or activation is; parameters once, along the width."""
    found = communicated(*QUICK, mesh, accumulation)
    assert sizes_of(found, "all-gather") == split_parameters(*QUICK, mesh, accumulation)[0]
    assert {x.kind for x in found} <= {"all-reduce", "all-gather", "reduce-scatter"}


@pytest.mark.parametrize(("mesh", "accumulation"), [*CASES, *SLOW_CASES])
def test_only_the_loop_over_microbatches_communicates(mesh, accumulation):
    """There, shards of the heads add their activations, in each microbatch."""
    found = communicated(*QUICK, mesh, accumulation)
    in_loop = Counter(x.size for x in found if x.in_loop)
    assert in_loop == (activations(mesh, accumulation) if accumulation > 1 else Counter())


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", [QUICK, ("linear", "grm"), ("swla", "soup"), ("delta", "mean")])
def test_heads_reduce_only_activations(case, accumulation):
    """Input gradients of q, k, v, u and coefficients are added before one reduction."""
    found = communicated(*case, "heads", accumulation)
    assert {x.kind for x in found} == {"all-reduce"}
    assert sizes_of(found, "all-reduce") == activations("heads", accumulation)
    assert all(x.in_loop == (accumulation > 1) for x in found if x.shape)
