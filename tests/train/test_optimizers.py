"""Optimizers, moments, the average of the parameters, and their sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tiny_run import TINY
from mc_core.optimizer import OPTIMIZERS, OptimizerConfig, is_orthogonalized
from train.config import MeshConfig, TrainConfig, from_dict
from train.mesh import open_mesh
from train.optimizer import make_optimizer
from train.step import abstract_state, averaged, build


def config_of(run: dict | None = None, **optimizer: object) -> TrainConfig:
    layer = TINY["model"]["layer"] | {"d_model": 16, "conv_width": 2}
    return from_dict(
        TINY
        | {
            "data": {"corpus": "x", "window": 16},
            "model": TINY["model"] | {"layer": layer, "tie_embeddings": False},
            "optimizer": TINY["optimizer"] | optimizer,
            "run": TINY["run"] | (run or {}),
        }
    )


def simple_loss(graphdef, params, rest, batch):
    """Return a loss that every parameter changes, and that compiles quickly."""
    target = batch.astype(jnp.float32).mean() / 100
    leaves = jax.tree.leaves(params)
    return sum(jnp.mean((leaf.astype(jnp.float32) - target) ** 2) for leaf in leaves), rest


def names(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


@functools.cache
def parameters():
    return build(config_of())[1].params


def updates_of(name: str) -> dict[str, jax.Array]:
    """Return the first updates of random gradients, at a learning rate of 1."""
    config = OptimizerConfig(1.0, 0, name=name, weight_decay=0.0, clip_norm=None)
    optimizer, params = make_optimizer(config, 10), parameters()
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params
    )
    return names(jax.jit(optimizer.update)(gradient, optimizer.init(params), params)[0])


def test_muon_orthogonalizes_projections_and_leaves_the_rest_to_adamw():
    muon, adamw = updates_of("muon"), updates_of("adamw")
    chosen = {name for name in muon if is_orthogonalized(name.split("/"))}
    assert {name.split("/")[-2] for name in chosen} == {
        "q_proj", "k_proj", "v_proj", "u_proj", "out_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for name, update in muon.items():
        if name not in chosen:
            np.testing.assert_array_equal(update, adamw[name], err_msg=name)
            continue
        values = np.linalg.svd(np.asarray(update), compute_uv=False)
        # Five Newton-Schulz iterations bring singular values near 1; AdamW's RMS is 0.2.
        values /= 0.2 * np.sqrt(max(update.shape))
        assert 0.5 < values.min() <= values.max() < 1.3, (name, values)
    for name in ("embed/embedding", "head/kernel", "blocks/0/mixer/q_conv/kernel"):
        assert name in muon
        assert name not in chosen


def test_lion_updates_by_signs():
    for name, update in updates_of("lion").items():
        np.testing.assert_array_equal(np.abs(update), 1.0, err_msg=name)


@pytest.mark.parametrize(
    "name", ["muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adamw", "lion"))]
)
def test_optimizers_train_in_bfloat16(name, monkeypatch):
    """Parameters and first moments have the dtype that was asked for; the loss decreases."""
    monkeypatch.setattr("train.step.sum_losses", simple_loss)
    dtypes = {"param_dtype": "bfloat16", "dtype": "bfloat16"}
    config = config_of(dtypes, name=name, moment_dtype="bfloat16", schedule="constant")
    _, state, step = build(config)
    losses = []
    for _ in range(4):
        state, metrics = step(state, np.full((2, 2, 17), 7, np.int32))
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    moments = {key: x.dtype for key, x in names(state.optimizer).items() if x.ndim}
    assert {dtype for key, dtype in moments.items() if "/mu/" in key} == {jnp.dtype(jnp.bfloat16)}
    assert {dtype for key, dtype in moments.items() if "/nu/" in key} <= {jnp.dtype(jnp.float32)}


def test_average_of_parameters_is_debiased_and_evaluated(monkeypatch):
    monkeypatch.setattr("train.step.sum_losses", simple_loss)
    decay = 0.7
    config = config_of(ema_decay=decay)
    _, state, step = build(config)
    for a, b in zip(
        *map(jax.tree.leaves, (averaged(state, config).params, state.params)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    seen = []
    for number in range(3):
        state, _ = step(state, np.full((1, 2, 17), number, np.int32))
        seen.append(jax.tree.map(np.asarray, state.params))
    weights = np.array([decay**2, decay, 1.0])
    weights /= weights.sum()
    mean = jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *seen)
    found = averaged(state, config)
    assert found.ema is None
    for a, b in zip(*map(jax.tree.leaves, (found.params, mean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_and_averages_are_sharded_like_their_parameters(name):
    """On 2 × 2 × 2 devices; the rest is replicated."""
    config = config_of(name=name, ema_decay=0.9)
    mesh = open_mesh(MeshConfig(data=2, fsdp=2, heads=2))
    _, state = abstract_state(config, mesh)
    params, moments = names(state.params), names((state.optimizer, state.ema))
    matched = set()
    for key, leaf in moments.items():
        owner = [p for p in params if key.endswith("/" + p) and params[p].shape == leaf.shape]
        if owner:
            (param,) = owner
            assert leaf.sharding == params[param].sharding, key
            matched.add(param)
        else:
            assert leaf.sharding.is_fully_replicated, key
    assert matched == params.keys()
    assert any(not leaf.sharding.is_fully_replicated for leaf in moments.values())


def test_schedule_of_wsd_is_constant_then_linear():
    from train.optimizer import make_schedule

    config = OptimizerConfig(1.0, 4, schedule="wsd", decay_fraction=0.25, final_fraction=0.5)
    rates = [float(make_schedule(config, 40)(step)) for step in range(41)]
    assert rates[4:31] == [1.0] * 27
    np.testing.assert_allclose(rates[30:41], np.linspace(1.0, 0.5, 11), rtol=1e-6)
