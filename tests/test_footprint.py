"""Bytes from the configuration alone are the bytes that a cache has."""

import jax
import pytest
from cases import AGGREGATIONS, MEMORIES
from flax import nnx

from mc_core import LinearConfig, MCConfig, TitansConfig
from mc_core.footprint import cache_footprint, kv_bytes, outgrows_kv
from mc_core.trees import flatten
from mc_jax import MemoryCachingLayer


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("memory", MEMORIES)
def test_bytes_of_a_cache(memory, aggregation):
    config = MCConfig(8, 2, MEMORIES[memory], aggregation, segment_size=4, conv_width=3)
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(0))
    for tokens, dtype, item in ((13, "float32", 4), (64, "bfloat16", 2)):
        cache = jax.eval_shape(
            lambda tokens=tokens, dtype=dtype: layer.init_cache(1, tokens, cache_dtype=dtype)
        )
        held = sum(leaf.size * leaf.dtype.itemsize for _, leaf in flatten(cache))
        assert cache_footprint(config, tokens, item).total == held


def test_what_a_token_reads():
    """`ssc` reads so many memories, `grm` all: equations 9 and 17."""
    configs = [MCConfig(64, 4, TitansConfig(), a, segment_size=64) for a in ("ssc", "grm", "none")]
    short, long = ([cache_footprint(c, n).read for c in configs] for n in (1024, 65536))
    assert short[0] == long[0]
    assert long[1] - long[2] == 64 * (short[1] - short[2])
    assert short[2] == long[2]


def test_memories_that_outgrow_a_kv_cache():
    """An MLP of expansion 4 needs segments of more than 4 times the head's width."""

    def config(size, memory=TitansConfig()):
        return MCConfig(64, 4, memory, "grm", segment_size=size)

    assert outgrows_kv(config(64))
    assert not outgrows_kv(config(65))
    assert not outgrows_kv(config(9, LinearConfig()))
    assert outgrows_kv(config(8, LinearConfig()))
    tokens = 64 * 1000
    memories = cache_footprint(config(64), tokens).memories
    assert memories == kv_bytes(config(64), tokens)
