"""JAX models with wrapped or adapted modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mc_core import LinearConfig, MCConfig, ModelConfig
from mc_jax import LanguageModel

LAYER = MCConfig(8, 2, LinearConfig(), segment_size=4, chunk_size=2, conv_width=2)
CONFIG = ModelConfig(
    vocab_size=11,
    num_layers=2,
    layer=LAYER,
    tie_embeddings=False,
    mixers=("memory", "attention"),
    ffn_width=8,
)
TOKENS = jnp.arange(14).reshape(2, 7) * 5 % 11


def make_model(config=CONFIG):
    return LanguageModel(config, rngs=nnx.Rngs(0))


def run_all_methods(model):
    """Return logits and traces of a full pass, and logits of a stream of two calls."""
    logits, traces = model.inspect(TOKENS)
    first, cache = model.extend(TOKENS[:, :3], model.init_cache(2, 7))
    second, cache = model.extend(TOKENS[:, 3:], cache)
    return logits, traces, jnp.concatenate([first, second], axis=1)


@pytest.mark.parametrize("remat", [False, True])
def test_wrapped_block_is_called(remat):
    """The wrapper's `__call__` runs instead of that of `Block`."""
    model = make_model(dataclasses.replace(CONFIG, remat=remat))
    shapes = []

    class CallRecorder(nnx.Module):
        def __init__(self, block):
            self.block = block

        def __call__(self, x, mask):
            shapes.append(x.shape)
            return self.block(x, mask)

    model.blocks[1] = CallRecorder(model.blocks[1])
    assert nnx.eval_shape(lambda model: model(TOKENS), model).shape == (2, 7, 11)
    assert shapes == [(2, 7, 8)]


def test_lora_wraps_every_projection():
    """An adapter on the head changes the logits, and all calls work with adapters."""
    model, rngs = make_model(), nnx.Rngs(1)

    def adapt(owner, name, out):
        setattr(owner, name, nnx.LoRA(8, 2, out, base_module=getattr(owner, name), rngs=rngs))

    adapt(model, "head", 11)
    x, factor = jnp.ones((1, 2, 8)), model.head.lora_b
    logits = []
    for scale in (0, 1):
        factor[...] = scale * jax.random.normal(jax.random.key(0), factor.shape)
        logits.append(np.asarray(model._logits(x)))
    np.testing.assert_allclose(logits[0], model.head.base_module(model.norm(x)), rtol=1e-5)
    assert not np.allclose(*logits)
    for block in model.blocks:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            adapt(block.mixer, name, 8)
    logits, traces, streamed = nnx.eval_shape(run_all_methods, model)
    assert logits.shape == streamed.shape == (2, 7, 11)
    assert traces[1] is None
