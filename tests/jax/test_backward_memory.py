"""Bytes saved for the backward pass, from abstract evaluation without compilation."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from helpers.cases import MEMORIES
from mc_core.config import MCConfig, ModelConfig
from mc_jax import LanguageModel, MemoryCachingLayer

# Float32, a layer of width 8 with 2 heads, 64 tokens, segments of 8, chunks of 4.
SAVED_BYTES = {
    ("titans", "grm"): 131_340,
    ("titans", "soup"): 182_604,
    ("titans", "ssc"): 154_812,
    ("dla", "residual"): 84_508,
    ("linear", "grm"): 64_464,
}


def saved_bytes(module, config, x):
    """Return the bytes that a module saves for the backward pass, including parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))

    def backward(state, x):
        return jax.vjp(lambda state: nnx.merge(graphdef, state)(x).sum(), state)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, state, x))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("case", SAVED_BYTES, ids="+".join)
def test_layer_residual_bytes_do_not_exceed_recorded(case):
    kind, aggregation = case
    config = MCConfig(8, 2, MEMORIES[kind], aggregation, segment_size=8, chunk_size=4)
    assert saved_bytes(MemoryCachingLayer, config, jnp.zeros((1, 64, 8))) <= SAVED_BYTES[case]


def test_remat_policies_save_less():
    """`full` saves block inputs only; `dots` also the products of tokens with weights."""
    layer = MCConfig(8, 2, MEMORIES["dla"], "none", segment_size=8, chunk_size=4)
    tokens = jnp.zeros((1, 64), jnp.int32)
    full, dots, none = (
        saved_bytes(LanguageModel, ModelConfig(17, 1, layer, remat=remat), tokens)
        for remat in ("full", "dots", "none")
    )
    assert full < none / 4
    products = 3 * 8 + 2 * layer.num_heads + 8 + 2 * 24 + 8  # q, k, v; coefficients; out; SwiGLU
    assert full + 4 * 64 * products * 0.8 < dots < full + 4 * 64 * products * 1.5
