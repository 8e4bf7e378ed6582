"""Cross-entropy in blocks of tokens: equal to that of all logits, in bounded memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.tree_util import Partial

import mc_jax.cross_entropy as jax_scores
import mc_torch.cross_entropy as torch_scores
from helpers.covering_arrays import thinned
from mc_jax.sharding import axes_sharding, make_mesh
from train.planning.hlo import measure, parse

B, T, D, SIZE = 2, 13, 4, 11
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, D))
KERNEL = RNG.standard_normal((D, SIZE))
LABELS = RNG.integers(SIZE, size=(B, T))
COTANGENT = RNG.standard_normal((B, T))
READ = RNG.random((B, T)) < 0.7
# Logits at once: all; 2 blocks without and 4 blocks with padding; a token.
LIMITS = {"all": 10**6, "even": 13 * SIZE, "padded": 7 * SIZE, "token": 1}


def project(kernel, x):
    return jnp.einsum("btd,ds->bts", x, kernel, preferred_element_type=kernel.dtype)


def run_jax(labels, read):
    def loss(x, kernel):
        scores = jax_scores.label_scores(Partial(project, kernel), x, labels, SIZE, read)
        return jnp.nansum(scores.losses * COTANGENT), scores

    (_, scores), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(X, KERNEL)
    return jax.tree.map(np.asarray, (*scores, *grads))


def run_torch(labels, read):
    x, kernel = (torch.tensor(a, requires_grad=True) for a in (X, KERNEL))
    read = None if read is None else torch.tensor(read)
    scores = torch_scores.label_scores(lambda x: x @ kernel, x, torch.tensor(labels), SIZE, read)
    (scores.losses * torch.tensor(COTANGENT)).nansum().backward()
    return tuple(y.detach().numpy() for y in (*scores, x.grad, kernel.grad))


def reference(labels, read):
    """Losses, best ids, and gradients of the labels that are read and in range."""
    logits = X @ KERNEL
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    valid = (labels >= 0) & (labels < SIZE)
    safe = np.where(valid, labels, 0)
    losses = -np.log(np.take_along_axis(chances, safe[..., None], -1)[..., 0])
    losses = np.where(valid, losses, np.nan)
    used = valid
    if read is not None:
        losses, used = np.where(read, losses, 0), valid & read
    errors = (chances - np.eye(SIZE)[safe]) * (COTANGENT * used)[..., None]
    return losses, logits.argmax(-1), errors @ KERNEL.T, np.einsum("btd,bts->ds", X, errors)


@pytest.mark.usefixtures("float64")
@thinned(2, package=["jax", "torch"], limit=list(LIMITS))
def test_losses_and_gradients_do_not_depend_on_blocks(monkeypatch, package, limit):
    """Labels out of range are NaN where they are read, and contribute no gradient."""
    module, run = {"jax": (jax_scores, run_jax), "torch": (torch_scores, run_torch)}[package]
    monkeypatch.setattr(module, "MAX_LOGITS", LIMITS[limit])
    wrong = LABELS.copy()
    wrong[0, 3], wrong[1, -1] = SIZE, -1
    for labels, read in ((LABELS, None), (wrong, None), (wrong, READ)):
        for actual, expected in zip(run(labels, read), reference(labels, read), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_memory_of_a_large_vocabulary():
    """With 50,304 ids and 8,192 tokens, at most a quarter of the memory of all logits."""
    size, tokens, d = 50_304, 8_192, 16
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((d, size), "float32"), ((8, tokens // 8, d), "bfloat16"))
    ]
    labels = jax.ShapeDtypeStruct((8, tokens // 8), jnp.int32)

    def in_blocks(kernel, x, labels):
        scores = jax_scores.label_scores(Partial(head, kernel), x, labels, size)
        return scores.losses.mean()

    def direct(kernel, x, labels):
        return jax_scores.cross_entropy(head(kernel, x), labels).mean()

    def head(kernel, x):
        kernel = kernel.astype(x.dtype)
        return jnp.einsum("btd,ds->bts", x, kernel, preferred_element_type=jnp.float32)

    def bytes_of(loss):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert 4 * bytes_of(in_blocks) <= bytes_of(direct)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "heads": 2},
        pytest.param({"data": 2, "context": 4}, marks=pytest.mark.slow),
    ],
)
def test_mesh_reduces_gradients_once(monkeypatch, sizes):
    """Devices share the tokens: no collective in a loop, and losses as on one device."""
    monkeypatch.setattr(jax_scores, "MAX_LOGITS", SIZE)
    x, kernel = jnp.asarray(RNG.standard_normal((4, 8, D)), jnp.float32), jnp.float32(KERNEL)
    labels = jnp.asarray(RNG.integers(SIZE, size=(4, 8)), jnp.int32)

    def loss(kernel, x):
        scores = jax_scores.label_scores(Partial(project, kernel), x, labels, SIZE)
        return scores.losses.mean()

    expected = jax.value_and_grad(loss, (0, 1))(kernel, x)
    mesh = make_mesh(**{"data": 1} | sizes)
    placed = (
        jax.device_put(kernel, axes_sharding(mesh, "embed")),
        jax.device_put(x, axes_sharding(mesh, "batch", "tokens")),
    )
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*placed).compile()
        found = step(*placed)
    for actual, value in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-6)
    communicated = measure(parse(step.as_text())).collectives
    assert not any(one.in_loop for one in communicated)
    dims = [dims for one in communicated if one.kind == "all-reduce" for _, dims in one.results]
    assert [dim for dim in dims if math.prod(dim) == D * SIZE] == [(D, SIZE)]
