"""The examples in docstrings: 13 tokens, segments of 4, chunks of 3."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mc_jax.chunk_layout
import mc_jax.gates
import mc_jax.sparse_reads
import mc_torch.chunk_layout
import mc_torch.gates
import mc_torch.sparse_reads
from mc_core import MCConfig
from mc_core.chunk_layout import call_shape
from mc_core.dense_reads import count_pairs, tile_pairs

CONFIG = MCConfig(8, 2, segment_size=4, chunk_size=3)
LAYOUTS = {
    "jax": (mc_jax.chunk_layout.make_call_layout, lambda x: jnp.asarray(x, jnp.int32)),
    "torch": (mc_torch.chunk_layout.make_call_layout, lambda x: torch.tensor(x, dtype=torch.int32)),
}


def test_call_shape():
    shape = call_shape(8, CONFIG)
    assert (shape.chunks, shape.completed, shape.width) == (5, 2, 3)
    assert [shape.chunk_index(position) for position in range(13)] == [
        0,
        0,
        0,
        1,
        2,
        2,
        2,
        3,
        4,
        4,
        4,
        5,
        6,
    ]
    assert [shape.chunk_start(chunk) for chunk in range(7)] == [0, 3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize("framework", LAYOUTS)
def test_make_call_layout(framework):
    make_call_layout, array = LAYOUTS[framework]
    layout = make_call_layout(array([5]), array([8]), 8, CONFIG)
    fields = {name: np.asarray(x).ravel().tolist() for name, x in layout._asdict().items()}
    assert fields == {
        "chunk_tokens": [0, 1, 8, 2, 8, 8, 3, 4, 5, 6, 8, 8, 7, 8, 8],
        "chunk_positions": [0, 1, 3, 6, 7, 8, 9, 12],
        "segment": [1, 1, 1, 2, 2, 2, 2, 3],
        "has_first_token": [False, True, True, True, True],
        "completes_chunk": [True, True, True, True, False],
        "starts_segment": [False, False, True, False, True],
        "completes_segment": [False, True, False, True, False],
        "completing_chunk": [1, 3],
        "completed_slots": [1, 2],
        "slot": [3],
    }


def test_dispatch():
    group = [4, 4, 4, 4, 0, 0, 0, 0, 0, 1, 1, 0, 2]
    position = [27, 27, 27, 27, 0, 1, 2, 3, 4, 6, 7, 5, 9]
    source = [4, 5, 6, 7, 8, 11, 9, 10, 13, 12] + [13] * 17
    block_memory = [0, 0, 1, 2, 3, 3, 3, 3, 3]
    result = mc_jax.sparse_reads._dispatch(jnp.asarray(group), 4, 3, 9)
    assert [x.tolist() for x in result] == [position, source, block_memory]
    result = mc_torch.sparse_reads._dispatch(torch.tensor([[group]]), 4, 3, 9)
    assert [x[0, 0].tolist() for x in result] == [position, source, block_memory]


@pytest.mark.parametrize("package", [mc_jax, mc_torch], ids=["jax", "torch"])
def test_gates_of_selected_memories(package):
    config = MCConfig(2, 1, aggregation="ssc", segment_size=4, chunk_size=3, ssc_top_k=2)
    array = jnp.asarray if package is mc_jax else torch.tensor
    u, running = array([[[[1.0, 0.0]]]]), array([[[[0.0, 0.0]]]])
    pools = array([[[[0.0, 1.0]], [[2.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])
    weights, selected = package.gates.compute_gates(u, pools, running, array([1]), config)
    assert selected.tolist() == [[[[0, 4]]]]
    assert weights.tolist() == [[[[0.5, 0.0, 0.5]]]]


def test_tile_pairs():
    small, large = tile_pairs(4)
    assert (small.segments.tolist(), small.memories.tolist()) == ([[1], [3]], [[0], [2]])
    assert (large.segments.tolist(), large.memories.tolist()) == ([[2, 3]], [[0, 1]])
    assert count_pairs(4) == 6
