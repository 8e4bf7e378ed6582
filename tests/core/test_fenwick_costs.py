"""Bytes and FLOPs of layers with `segmentation="fenwick"` match caches and programs."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bench.count import count_flops
from helpers.cases import AGGREGATIONS, MEMORIES
from helpers.covering_arrays import thinned
from helpers.fenwick_cases import STARTS
from mc_core import LinearConfig, MCConfig, TitansConfig
from mc_core.footprint import cache_footprint, flops_per_token, outgrows_kv, state_bytes
from mc_core.tree_utils import flatten
from mc_jax import MemoryCachingLayer


def build(config: MCConfig) -> Any:
    """Return the parts of a layer with abstract parameters."""
    return nnx.split(nnx.eval_shape(lambda: MemoryCachingLayer(config, rngs=nnx.Rngs(0))))


def cache_bytes(config: MCConfig, tokens: int, dtype: str) -> int:
    graph, state = build(config)
    cache = jax.eval_shape(
        lambda state: nnx.merge(graph, state).init_cache(1, tokens, cache_dtype=dtype), state
    )
    return sum(leaf.size * leaf.dtype.itemsize for _, leaf in flatten(cache))


@thinned(3, start=["-".join(start) for start in STARTS], aggregation=AGGREGATIONS)
def test_cache_bytes_match_footprint(start, aggregation):
    memory, _, mode = start.rpartition("-")
    options = {"segmentation": "fenwick", "segment_size": 4, "conv_width": 3}
    config = MCConfig(8, 2, MEMORIES[memory], aggregation, state_init_mode=mode, **options)
    for tokens, dtype, item in ((13, "float32", 4), (64, "bfloat16", 2)):
        assert cache_footprint(config, tokens, item).total == cache_bytes(config, tokens, dtype)


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (4, 1), (5, 2), (12, 2), (13, 3), (64, 5)])
def test_slots_are_one_per_exponent(tokens, slots):
    config = MCConfig(8, 2, segmentation="fenwick", segment_size=4)
    assert config.slots(tokens) == slots


def test_state_grows_with_the_logarithm_of_the_length():
    config = MCConfig.log_linear_pp(64, 4, TitansConfig(), segment_size=64)
    sizes = [state_bytes(config, 64 << power) for power in range(4, 12)]
    assert len({b - a for a, b in pairwise(sizes)}) == 1
    assert not outgrows_kv(config)


def test_bytes_read_per_token_count_the_set_bits():
    config = MCConfig.log_linear_pp(64, 4, TitansConfig(), segment_size=64)
    none = cache_footprint(config, 0 + 63).read
    memory = cache_footprint(config, 64).read - none
    for blocks in (3, 4, 6, 7, 255):
        assert cache_footprint(config, 64 * blocks).read == none + memory * blocks.bit_count()


@pytest.mark.parametrize(
    ("memory", "aggregation", "mode"),
    [
        ("linear", "grm", "restart"),
        ("titans", "grm", "checkpoint"),
        ("swla", "ssc", "checkpoint"),
        ("dla", "soup", "checkpoint"),
        ("linear", "residual", "restart"),
    ],
)
def test_flops_match_compiled_program(memory, aggregation, mode):
    """The program needs up to 25% more, for running sums, mixtures and reads with weight 0."""
    options = {"segmentation": "fenwick", "segment_size": 128, "chunk_size": 16}
    config = MCConfig(256, 4, MEMORIES[memory], aggregation, state_init_mode=mode, **options)
    graph, state = build(config)
    x = jax.ShapeDtypeStruct((1, 1024, config.d_model), jnp.float32)
    flops = count_flops(lambda s, x: nnx.merge(graph, s)(x), state, x) / 1024
    assert flops_per_token(config, 1024) <= flops <= 1.25 * flops_per_token(config, 1024)


def test_flops_match_hand_computation():
    tokens, d, size = 23, 64, 2 * 32 * 32
    layer = MCConfig(d, 2, LinearConfig(), "grm", segmentation="fenwick", segment_size=4)
    base = 10 * d * d + 4 * size + 4 * d * 4  # projections with u, write and read, chunk
    counts = [(i // 4).bit_count() for i in range(tokens)]
    cached = sum(2 * size * count + 2 * d * (count + 1) for count in counts) / tokens
    assert flops_per_token(layer, tokens) == pytest.approx(base + cached)
