"""Training with stacked blocks: the same steps, checkpoints and names as with single blocks."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tiny_run import TINY, mc, write_config
from mc_jax.sharding import split_rows
from train.checkpoint import load_state
from train.config import TrainConfig, from_dict
from train.mesh import open_mesh
from train.optimizer import decay_mask, make_optimizer
from train.stacked import (
    STACKED,
    finite_flags,
    parameter_names,
    stack_blocks,
    stacking_of,
    unstack_blocks,
)
from train.step import TrainState, abstract_state, build, make_train_step

ROWS, TOKENS = 8, 16
MIXERS = ["memory", "attention"]


def config_of(
    scan: bool,
    *,
    layers: int = 5,
    mesh: dict[str, int] | None = None,
    accumulation: int = 1,
    **keys: Any,
) -> TrainConfig:
    layer = TINY["model"]["layer"] | {"d_model": 16, "num_heads": 4}
    model = {"num_layers": layers, "mixers": MIXERS, "scan_layers": scan, "layer": layer} | keys
    sizes = {"batch_size": ROWS // accumulation, "accumulation": accumulation}
    return from_dict(
        TINY
        | {
            "data": {"corpus": "x", "window": TOKENS},
            "model": TINY["model"] | model,
            "optimizer": TINY["optimizer"] | {"learning_rate": 1e-3, "eps": 1e-3},
            "run": TINY["run"] | sizes | {"mesh": {"data": 1} | (mesh or {})},
        }
    )


def train(config: TrainConfig) -> tuple[list[float], TrainState]:
    """Return losses and gradient norms of two steps, and the state after them."""
    _, state, step = build(config, open_mesh(config.run.mesh))
    shape = (config.run.accumulation, config.run.batch_size, TOKENS + 1)
    tokens = np.random.default_rng(0).integers(256, size=shape, dtype=np.int32)
    metrics = []
    for _ in range(2):
        state, found = step(state, split_rows(tokens, state, axis=1))
        metrics += [float(found.loss), float(found.grad_norm)]
    return metrics, state


@cache
def unrolled(layers: int, mixers: tuple[str, ...]) -> tuple[list[float], TrainState]:
    return train(config_of(False, layers=layers, mixers=list(mixers)))


def assert_trains_like_single_blocks(config: TrainConfig) -> TrainState:
    metrics, state = train(config)
    expected, single = unrolled(config.model.num_layers, config.model.mixers)
    np.testing.assert_allclose(metrics, expected, rtol=1e-4)
    found = unstack_blocks(state)
    assert jax.tree.structure(found) == jax.tree.structure(single)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)
    return state


def test_stack_of_two_trains_like_single_blocks():
    state = assert_trains_like_single_blocks(config_of(True, layers=2, mixers=["memory"]))
    assert {x.shape[0] for x in jax.tree.leaves(state.params[STACKED])} == {2}


@pytest.mark.slow
def test_stacked_blocks_train_like_single_blocks():
    """Two repetitions of two mixers, and a block of its own."""
    config = config_of(True)
    state = assert_trains_like_single_blocks(config)
    stacks = state.params[STACKED]
    assert {x.shape[0] for x in jax.tree.leaves(stacks)} == {2}
    assert list(state.params["blocks"]) == [4]
    for a, b in zip(
        jax.tree.leaves(stack_blocks(unstack_blocks(state), stacking_of(config.model))),
        jax.tree.leaves(state),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "mesh",
    [{"data": 2, "fsdp": 2, "heads": 2}, {"fsdp": 4}, {"data": 2, "context": 2}],
    ids=str,
)
def test_stacked_blocks_train_on_meshes(mesh, accumulation):
    state = assert_trains_like_single_blocks(
        config_of(True, mesh=mesh, accumulation=accumulation, remat=True)
    )
    for part in (state.params, state.optimizer[1][0].mu):
        kernel = part[STACKED][0]["mixer"]["q_proj"]["kernel"]
        names = (name if mesh.get(name, 1) > 1 else None for name in ("fsdp", "heads"))
        shards = [1, *(mesh.get(name, 1) if name else 1 for name in names)]
        local = tuple(n // k for n, k in zip(kernel.shape, shards, strict=True))
        assert kernel.addressable_shards[0].data.shape == local


def test_stacks_have_the_decay_and_the_names_of_their_blocks():
    config = config_of(True)
    _, state = abstract_state(config)
    params = stack_blocks(state.params, stacking_of(config.model))
    mask = jax.tree.map(lambda x, decayed: np.full(x.shape, decayed), params, decay_mask(params))
    each = jax.tree.map(lambda x: bool(x.all()), unstack_blocks(jax.tree.map(jnp.asarray, mask)))
    assert each == decay_mask(state.params)

    values = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    kernel = values[STACKED][1]["mixer"]["q_proj"]["kernel"]
    values[STACKED][1]["mixer"]["q_proj"]["kernel"] = kernel.at[1, 0, 0].set(jnp.nan)
    flags = [np.asarray(x).reshape(-1) for x in jax.tree.leaves(finite_flags(values))]
    names = zip(parameter_names(params), np.concatenate(flags), strict=True)
    wrong = [name for name, finite in names if not finite]
    assert wrong == ["blocks/3/mixer/q_proj/kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["true", "false"])
def test_checkpoints_of_both_forms_are_the_same(tmp_path, monkeypatch, no_pictures, first):
    """A run resumes, and another one starts, in the other form."""
    path = write_config(tmp_path)
    other = "false" if first == "true" else "true"
    words = ["model.num_layers=3", "run.steps=3", "optimizer.warmup_steps=1", "run.save_every=1"]
    assert mc(monkeypatch, "train", path, *words, f"model.scan_layers={first}") == 0
    run = tmp_path / "runs" / "tiny"
    saved = load_state(run)[2].params
    assert sorted(saved["blocks"]) == [0, 1, 2]
    words[1] = "run.steps=4"
    assert mc(monkeypatch, "train", path, *words, f"model.scan_layers={other}") == 0
    assert load_state(run)[3] == 4
    new = [f"run.init_from={run}", "run.init_optimizer=true", f"run.directory={tmp_path / 'new'}"]
    assert mc(monkeypatch, "train", path, *words, *new, f"model.scan_layers={first}") == 0


@pytest.mark.slow
def test_size_of_the_program_does_not_depend_on_the_number_of_blocks():
    """Temporary memory grows by less than twice the input of a block."""

    def compiled(layers):
        config = config_of(True, layers=layers, mixers=["memory"], remat=True)
        graphdef, state = abstract_state(config)
        state = stack_blocks(state, stacking_of(config.model))
        step: Any = make_train_step(graphdef, make_optimizer(config.optimizer, 10))
        batch = jax.ShapeDtypeStruct((1, 16 * ROWS, 4 * TOKENS + 1), jnp.int32)
        return step.lower(state, batch).compile()

    small, large = compiled(2), compiled(24)
    lines = [program.as_text().count("\n") for program in (small, large)]
    assert lines[1] < 1.2 * lines[0]
    temporary = [x.memory_analysis().temp_size_in_bytes for x in (small, large)]
    block_input = 16 * ROWS * 4 * TOKENS * 16 * 4
    assert temporary[1] - temporary[0] < 2 * 22 * block_input
