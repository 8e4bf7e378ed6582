"""Orthogonal updates of chunks: `chunk_update="orthogonal"` of MLP memories."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax.numerics
import mc_torch.backends.mlp
import mc_torch.numerics
from helpers import jax_calls, torch_calls
from helpers.cases import MODES, FunctionCase, assert_close, make_case
from mc_core import DLAConfig, MCConfig, MemoryConfig, TitansConfig, register_memory
from mc_torch.backends.dla import DLA

pytestmark = pytest.mark.usefixtures("float64")
CALLS = pytest.mark.parametrize("calls", [jax_calls, torch_calls], ids=["jax", "torch"])
MEMORY = DLAConfig(expansion=2, chunk_update="orthogonal", inner_clip=None)


def orthogonalize_jax(x: np.ndarray) -> np.ndarray:
    return np.asarray(mc_jax.numerics.orthogonalize(jnp.asarray(x)))


def orthogonalize_torch(x: np.ndarray) -> np.ndarray:
    return mc_torch.numerics.orthogonalize(torch.tensor(x)).numpy()


ORTHOGONALIZE = pytest.mark.parametrize(
    "orthogonalize", [orthogonalize_jax, orthogonalize_torch], ids=["jax", "torch"]
)


@ORTHOGONALIZE
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 11), (2, 11, 6)])
def test_singular_values_become_almost_equal(orthogonalize, shape):
    """For singular values from 1 to 0.01."""
    x = np.random.default_rng(0).standard_normal(shape)
    left, _, right = np.linalg.svd(x, full_matrices=False)
    x = left * np.geomspace(1.0, 0.01, min(shape[1:])) @ right
    new = orthogonalize(x)
    np.testing.assert_allclose(
        np.linalg.norm(new, axis=(1, 2)), np.linalg.norm(x, axis=(1, 2)), rtol=1e-12
    )
    # In the singular vectors of x, the new matrix is diagonal.
    diagonal = left.swapaxes(1, 2) @ new @ right.swapaxes(1, 2)
    values = np.diagonal(diagonal, axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, values[:, None] * np.eye(min(shape[1:])), atol=1e-12)
    assert (values.max(axis=1) < 1.8 * values.min(axis=1)).all()


@ORTHOGONALIZE
def test_rank_one_matrices_and_zero_are_unchanged(orthogonalize):
    rng = np.random.default_rng(1)
    outer = rng.standard_normal((4, 5, 1)) * rng.standard_normal((4, 1, 7))
    x = outer * np.array([1.0, 1e3, 1e-3, 0.0])[:, None, None]
    np.testing.assert_allclose(orthogonalize(x), x, rtol=1e-9, atol=1e-15)


def test_gradients_are_finite_and_one_at_zero():
    x = np.random.default_rng(2).standard_normal((3, 4, 5))
    x[1], x[2] = 0.0, x[2] * 1e-5
    weight = np.random.default_rng(3).standard_normal(x.shape)
    by_jax = jax.grad(lambda x: jnp.sum(weight * mc_jax.numerics.orthogonalize(x)))(x)
    at = torch.tensor(x, requires_grad=True)
    torch.sum(torch.tensor(weight) * mc_torch.numerics.orthogonalize(at)).backward()
    assert_close(by_jax, at.grad.numpy(), 1e-9)
    np.testing.assert_array_equal(by_jax[1], weight[1])


def states(case: FunctionCase, calls: Any, method: str = "chunked") -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(w) for w in calls.run(case, method).cache.segments.weights)


def with_memory(case: FunctionCase, **options: Any) -> FunctionCase:
    return case.with_config(memory=replace(case.config.memory, **options))


@CALLS
@pytest.mark.parametrize("mode", MODES)
def test_only_complete_chunks_are_orthogonalized(calls, mode):
    """Of 11 tokens in segments of 6 and chunks of 4, chunks end after tokens 4, 6 and 10."""
    case = make_case(MEMORY, tokens=11, segment_size=6, chunk_size=4, state_init_mode=mode)
    plain = with_memory(case, chunk_update="sum")
    for tokens, same in ((3, True), (4, False), (5, False), (6, False)):
        parts = [
            states(x.map_inputs(lambda x, tokens=tokens: x[:, :tokens]), calls)
            for x in (case, plain)
        ]
        errors = [np.abs(a - b).max() for a, b in zip(*parts, strict=True)]
        assert (max(errors) < 1e-12) == same, (tokens, errors)


@CALLS
@pytest.mark.parametrize("method", ["chunked", "recurrent"])
def test_update_of_a_chunk_has_equal_singular_values(calls, method):
    """The first of two segments, one chunk with retention; in a sum, few directions are large."""
    case = make_case(MEMORY, "none", tokens=30, segment_size=24, chunk_size=24, width=6)
    retained = np.prod(case.coefficients.retention[:, :24], axis=1)[:, :, None, None]
    spreads = []
    for update in ("orthogonal", "sum"):
        weights = states(with_memory(case, chunk_update=update), calls, method)
        for weight, initial in zip(weights, case.initial, strict=True):
            values = np.linalg.svd(weight[:, 0] - retained * initial[None])[1]
            spreads.append((values[..., 0] / values[..., -1]).max())
    assert max(spreads[:2]) < 1.8 < 5 < min(spreads[2:]), spreads


@CALLS
@pytest.mark.parametrize("memory", [MEMORY, TitansConfig(expansion=1, chunk_update="orthogonal")])
def test_chunks_of_one_token_of_a_matrix_are_plain_updates(calls, memory):
    """A single token's update has rank one, without the momentum of earlier tokens."""
    memory = replace(memory, **({"momentum": 0.0} if memory.has_momentum else {}))
    case = make_case(memory, chunk_size=1, mask="some")
    if memory.has_momentum:
        zero = np.zeros_like(case.coefficients.step)
        case = case._replace(coefficients=case.coefficients._replace(momentum=zero))
    expected = calls.run(with_memory(case, chunk_update="sum"))
    assert_close(calls.run(case).output, expected.output, 1e-9)


@CALLS
@pytest.mark.parametrize("mask", ["segment", "row"])
def test_masked_chunks_have_finite_gradients(calls, mask):
    memory = TitansConfig(expansion=2, chunk_update="orthogonal")
    case = make_case(memory, mask=mask, segment_size=4, chunk_size=2)
    leaves = jax.tree.leaves(calls.gradients(case))
    assert all(np.isfinite(np.asarray(x)).all() for x in leaves)
    # Gradients at masked tokens are zero, not the rounding errors of large terms.
    assert not np.asarray(calls.gradients(case)["v"])[~case.mask].any()


@dataclass(frozen=True)
class UnitRowsConfig(DLAConfig):
    """DLA whose rows are normalized at the end of each chunk."""

    kind = "unit_rows"
    updates_at_chunk_end = True


class UnitRows(DLA):
    def end_chunk(self, state: mc_torch.backends.MemoryState) -> mc_torch.backends.MemoryState:
        return state._replace(
            weights=tuple(w / w.norm(dim=-1, keepdim=True) for w in state.weights)
        )


def test_custom_memory_changes_the_memory_at_chunk_ends(monkeypatch):
    monkeypatch.setitem(mc_torch.backends.base.BACKENDS, "unit_rows", UnitRows)
    case = make_case(UnitRowsConfig(), tokens=11, segment_size=6, chunk_size=4, mask="some")
    results = [torch_calls.run(case, method) for method in ("chunked", "recurrent")]
    assert_close(*results, 1e-12)
    for weight in results[0].cache.segments.weights:
        norms = np.linalg.norm(weight, axis=-1)
        np.testing.assert_allclose(norms[:, 0], 1.0, rtol=1e-12)  # a complete segment
        assert np.abs(norms[:, 1] - 1.0).max() > 1e-3  # its last chunk is open

    with pytest.raises(ValueError, match="updates_at_chunk_end = True: must be False, because"):
        UnitRowsConfig(written_layers="last", inner_clip=None, residual=False)

    monkeypatch.delattr(UnitRows, "end_chunk")
    monkeypatch.delattr(mc_torch.backends.mlp.MLPMemory, "end_chunk")
    with pytest.raises(TypeError, match="UnitRows must define end_chunk"):
        torch_calls.run(case)


def test_open_chunks_of_a_torch_stream_are_not_orthogonalized(monkeypatch):
    """A call on a CPU that ends no chunk skips the iterations."""
    calls = []
    count = lambda self, state: calls.append(1) or state  # noqa: E731
    monkeypatch.setattr(mc_torch.backends.mlp.MLPMemory, "end_chunk", count)
    config = MCConfig(8, 2, MEMORY, segment_size=8, chunk_size=4)
    layer = mc_torch.MemoryCachingLayer(config)
    x, cache = torch.ones(2, 8, 8), layer.init_cache(2, 8)
    for token in x.split(1, dim=1):
        _, cache = layer.extend(token, cache)
    assert len(calls) == 2


def test_invalid_options_are_rejected():
    with pytest.raises(ValueError, match=r"chunk_update = 'muon': must be one of 'sum', 'ortho"):
        DLAConfig(chunk_update="muon")
    options = {"written_layers": "last", "inner_clip": None, "residual": False}
    with pytest.raises(
        ValueError, match=r"chunk_update = 'orthogonal': must be 'sum' if written_layers = 'last'"
    ):
        DLAConfig(**options, chunk_update="orthogonal")

    with pytest.raises(ValueError, match="sets updates_at_chunk_end: gradient_uses_weights"):

        @register_memory
        @dataclass(frozen=True)
        class Ending(MemoryConfig):
            kind = "ending"
            description = "matrix with a change at the end of chunks"
            ranges = {"step": (0.0, 1.0), "retention": (0.0, 1.0)}  # noqa: RUF012
            updates_at_chunk_end = True
            coefficients: str = "token"
            step: float = 0.5
            retention: float = 1.0
