"""Modules with different kinds of parameters, and random weights for them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import mc_jax
import mc_torch
from mc_core import (
    DLAConfig,
    LinearConfig,
    LogLinearConfig,
    MCConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.weights import Flat, leaves

LAYERS = {
    "linear": MCConfig(8, 2),
    "linear-head": MCConfig(8, 2, LinearConfig(coefficients="head"), "none", output_norm="none"),
    "linear-learned": MCConfig(8, 2, LinearConfig(learn_initial=True), "soup"),
    "linear-normalized": MCConfig(8, 2, LinearConfig("elu+1", normalize=True), use_q_as_u=True),
    "swla": MCConfig(8, 2, SWLAConfig(learn_initial=True), "ssc", conv_width=3, gate_bias=1.0),
    "dla": MCConfig(8, 2, DLAConfig(depth=3, expansion=2), "residual", conv_width=4),
    "titans": MCConfig(
        8, 2, TitansConfig(norm="layer", expansion=2), conv_width=4, softmax_temperature="learned"
    ),
    "log-linear": LogLinearConfig(8, 2, 7, conv_width=3),
}
MODELS = {
    "tied": ModelConfig(11, 2, LAYERS["linear"]),
    "hybrid": ModelConfig(
        11,
        3,
        LAYERS["swla"],
        ffn_width=0,
        mixers=("attention", "memory", "window"),
        attention_window=5,
    ),
    "free": ModelConfig(11, 1, LAYERS["titans"], ffn_width=12, tie_embeddings=False),
    "mixed": ModelConfig(11, 2, LAYERS["linear"], mixers=("log_linear", "memory"), num_levels=7),
}
ALL: dict[str, Any] = {**LAYERS, **MODELS}


def jax_module(config: Any, dtype: Any = jnp.float32, seed: int = 0) -> Any:
    kind = mc_jax.model.LAYERS.get(type(config), mc_jax.LanguageModel)
    return kind(config, rngs=nnx.Rngs(seed), param_dtype=dtype)


def torch_module(config: Any, dtype: Any = None) -> Any:
    kind = mc_torch.model.LAYERS.get(type(config), mc_torch.LanguageModel)
    return kind(config, dtype=dtype)


def draw(config: Any, dtype: str = "float32", seed: int = 0) -> Flat:
    """Draw all parameters in PyTorch's layouts; none is zero, constant or symmetric."""
    rng = np.random.default_rng(seed)
    wanted = leaves(torch_module(config).state_dict())
    return {
        name: (0.5 * rng.standard_normal(leaf.shape)).astype(jnp.dtype(dtype))
        for name, leaf in wanted.items()
    }


def same_bits(left: Flat, right: Flat) -> bool:
    return left.keys() == right.keys() and all(
        (left[name].dtype, left[name].shape) == (right[name].dtype, right[name].shape)
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )
