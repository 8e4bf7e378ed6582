"""Parameter, byte and FLOP counts of configurations match modules and caches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from bench.count import count_flops
from helpers.cases import AGGREGATIONS, MEMORIES
from helpers.covering_arrays import thinned
from helpers.weight_cases import LAYERS, MODELS
from mc_core import (
    AttentionConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    TitansConfig,
)
from mc_core.footprint import (
    cache_footprint,
    flops_per_token,
    kv_bytes,
    layer_parameters,
    model_parameters,
    outgrows_kv,
    state_bytes,
)
from mc_core.tree_utils import flatten
from mc_jax import LanguageModel
from mc_jax.model import LAYERS as KINDS

ATTENTION = {
    "full": AttentionConfig(64, 2, conv_width=4),
    "window": AttentionConfig(64, 2, 5, output_norm="none"),
    "log-linear": LogLinearConfig(64, 2, conv_width=4),
    "log-linear-head": LogLinearConfig(64, 2, 7, retention="head", output_norm="none"),
    "log-linear-constant": LogLinearConfig(64, 2, 7, retention="constant"),
}


def build(config: Any) -> Any:
    """Return a module with abstract parameters."""
    kind = KINDS.get(type(config), LanguageModel)
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))


def cache_bytes(config: Any, tokens: int, dtype: str = "float32") -> int:
    """Return the bytes of a stream's cache."""
    graph, state = nnx.split(build(config))
    cache = jax.eval_shape(
        lambda state: nnx.merge(graph, state).init_cache(1, tokens, cache_dtype=dtype), state
    )
    return sum(leaf.size * leaf.dtype.itemsize for _, leaf in flatten(cache))


@thinned(3, memory=list(MEMORIES), aggregation=AGGREGATIONS)
def test_cache_bytes_match_footprint(memory, aggregation):
    config = MCConfig(8, 2, MEMORIES[memory], aggregation, segment_size=4, conv_width=3)
    for tokens, dtype, item in ((13, "float32", 4), (64, "bfloat16", 2)):
        assert cache_footprint(config, tokens, item).total == cache_bytes(config, tokens, dtype)


def test_bytes_read_per_token():
    """`ssc` reads `top_k` memories, `grm` all (equations 9 and 17)."""
    configs = [MCConfig(64, 4, TitansConfig(), a, segment_size=64) for a in ("ssc", "grm", "none")]
    short, long = ([cache_footprint(c, n).read for c in configs] for n in (1024, 65536))
    assert short[0] == long[0]
    assert long[1] - long[2] == 64 * (short[1] - short[2])
    assert short[2] == long[2]


def test_outgrows_kv_compares_with_kv_cache():
    """An MLP of expansion 4 is smaller only for segments longer than 4 times the head width."""

    def config(size, memory=TitansConfig()):
        return MCConfig(64, 4, memory, "grm", segment_size=size)

    assert outgrows_kv(config(64))
    assert not outgrows_kv(config(65))
    assert not outgrows_kv(config(9, LinearConfig()))
    assert outgrows_kv(config(8, LinearConfig()))
    tokens = 64 * 1000
    memories = cache_footprint(config(64), tokens).memories
    assert memories == kv_bytes(config(64), tokens)


@pytest.mark.parametrize("name", [*ATTENTION, *MODELS])
def test_attention_and_model_cache_bytes(name):
    config = {**ATTENTION, **MODELS}[name]
    for tokens, dtype, item in ((3, "float32", 4), (64, "bfloat16", 2)):
        assert state_bytes(config, tokens, item) == cache_bytes(config, tokens, dtype)


@pytest.mark.parametrize("name", [*LAYERS, *ATTENTION, *MODELS])
def test_parameter_counts(name):
    config = {**LAYERS, **ATTENTION, **MODELS}[name]
    count = model_parameters if isinstance(config, ModelConfig) else layer_parameters
    leaves = jax.tree.leaves(nnx.state(build(config), nnx.Param))
    assert count(config) == sum(leaf.size for leaf in leaves)


def compiled_flops(config: Any, tokens: int) -> float:
    """Return the FLOPs per token of the forward pass's matrix products."""
    graph, state = nnx.split(build(config))
    x = jax.ShapeDtypeStruct((1, tokens, config.d_model), jnp.float32)
    return count_flops(lambda s, x: nnx.merge(graph, s)(x), state, x) / tokens


@pytest.mark.parametrize("tokens", [pytest.param(128, marks=pytest.mark.slow), 1024])
@thinned(4, memory=list(MEMORIES), aggregation=AGGREGATIONS)
def test_flops_of_memory_layer_match_compiled_program(memory, aggregation, tokens):
    """The program needs up to 25% more, for running sums, mixtures and reads with weight 0."""
    config = MCConfig(256, 4, MEMORIES[memory], aggregation, segment_size=128, chunk_size=16)
    flops = compiled_flops(config, tokens)
    assert flops_per_token(config, tokens) <= flops <= 1.25 * flops_per_token(config, tokens)


@pytest.mark.parametrize("tokens", [16, 128, 1000])
def test_flops_of_log_linear_attention_match_compiled_program(tokens):
    config = LogLinearConfig(256, 4, chunk_size=16)
    flops = compiled_flops(config, tokens)
    assert flops_per_token(config, tokens) <= flops <= 1.25 * flops_per_token(config, tokens)


def test_flops_match_hand_computation():
    tokens, d = 23, 64
    assert flops_per_token(ATTENTION["full"], tokens) == pytest.approx(
        8 * d * d + 6 * 4 * d + 4 * d * sum(i + 1 for i in range(tokens)) / tokens
    )
    assert flops_per_token(ATTENTION["window"], tokens) == pytest.approx(
        8 * d * d + 4 * d * sum(min(i + 1, 5) for i in range(tokens)) / tokens
    )
    linear = LinearConfig(coefficients="token")
    layer = MCConfig(d, 2, linear, "ssc", ssc_top_k=2, segment_size=4, chunk_size=3, conv_width=4)
    size = 2 * 32 * 32
    block_flops = 10 * d * d + 6 * 4 * d + 2 * 2 * d * 2 + 4 * size + 4 * d * 3
    cached = sum(2 * size * min(i // 4, 2) + 2 * d * (i // 4 + 1) for i in range(tokens)) / tokens
    assert flops_per_token(layer, tokens) == pytest.approx(block_flops + cached)
    scores = sum(2 * d * (i // 4 + 1) for i in range(tokens)) / tokens
    by_token = dataclasses.replace(layer, gate="token")
    assert flops_per_token(by_token, tokens) == pytest.approx(block_flops + cached - scores)
    model = ModelConfig(
        100, 3, layer, ffn_width=50, mixers=("memory", "attention"), attention_window=9
    )
    attention = AttentionConfig(d, 2, conv_width=4)
    assert flops_per_token(model, tokens) == pytest.approx(
        2 * flops_per_token(layer, tokens) + flops_per_token(attention, tokens)
        + 3 * 6 * d * 50 + 2 * d * 100
    )  # fmt: skip
