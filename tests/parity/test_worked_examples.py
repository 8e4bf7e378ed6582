"""The examples in docstrings: 13 tokens, segments of 4, chunks of 3."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax.gates
import mc_jax.grid
import mc_jax.sparse
import mc_torch.gates
import mc_torch.grid
import mc_torch.sparse
from mc_core import MCConfig
from mc_core.grids import grid_shape
from mc_core.triangle import cut_triangle, pairs_read

CONFIG = MCConfig(8, 2, segment_size=4, chunk_size=3)
GRIDS = {
    "jax": (mc_jax.grid.make_grid, lambda x: jnp.asarray(x, jnp.int32)),
    "torch": (mc_torch.grid.make_grid, lambda x: torch.tensor(x, dtype=torch.int32)),
}


def test_grid_shape():
    shape = grid_shape(8, CONFIG)
    assert (shape.chunks, shape.completed, shape.places) == (5, 2, 3)
    assert [shape.chunk_of(at) for at in range(13)] == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6]
    assert [shape.begin_of(chunk) for chunk in range(7)] == [0, 3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize("framework", GRIDS)
def test_make_grid(framework):
    make_grid, array = GRIDS[framework]
    grid = make_grid(array([5]), array([8]), 8, CONFIG)
    found = {name: np.asarray(x).ravel().tolist() for name, x in grid._asdict().items()}
    assert found == {
        "source": [0, 1, 8, 2, 8, 8, 3, 4, 5, 6, 8, 8, 7, 8, 8],
        "place": [0, 1, 3, 6, 7, 8, 9, 12],
        "segment": [1, 1, 1, 2, 2, 2, 2, 3],
        "opens": [False, True, True, True, True],
        "restarts": [False, False, True, False, True],
        "ends": [False, True, False, True, False],
        "last": [1, 3],
        "slots": [1, 2],
        "slot": [3],
    }


def test_dispatch():
    group = [4, 4, 4, 4, 0, 0, 0, 0, 0, 1, 1, 0, 2]
    place = [27, 27, 27, 27, 0, 1, 2, 3, 4, 6, 7, 5, 9]
    source = [4, 5, 6, 7, 8, 11, 9, 10, 13, 12] + [13] * 17
    owner = [0, 0, 1, 2, 3, 3, 3, 3, 3]
    found = mc_jax.sparse._dispatch(jnp.asarray(group), 4, 3, 9)
    assert [x.tolist() for x in found] == [place, source, owner]
    found = mc_torch.sparse._dispatch(torch.tensor([[group]]), 4, 3, 9)
    assert [x[0, 0].tolist() for x in found] == [place, source, owner]


@pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])
def test_selected(package):
    config = MCConfig(2, 1, aggregation="ssc", segment_size=4, chunk_size=3, ssc_top_k=2)
    array = jnp.asarray if package is mc_jax else torch.tensor
    u, running = array([[[[1.0, 0.0]]]]), array([[[[0.0, 0.0]]]])
    pools = array([[[[0.0, 1.0]], [[2.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])
    weights, selected = package.gates.gate(u, pools, running, array([1]), config)
    assert selected.tolist() == [[[[0, 4]]]]
    assert weights.tolist() == [[[[0.5, 0.0, 0.5]]]]


def test_triangle():
    one, two = cut_triangle(4)
    assert (one.segments.tolist(), one.memories.tolist()) == ([[1], [3]], [[0], [2]])
    assert (two.segments.tolist(), two.memories.tolist()) == ([[2, 3]], [[0, 1]])
    assert pairs_read(4) == 6
