"""NumPy oracle of the layer: projections and memory (section 1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import oracle
from helpers.cases import Array, Coefficients
from mc_core import DLAConfig, LinearConfig, MCConfig, SWLAConfig, TitansConfig
from mc_core.config import NORM_EPS
from mc_jax import MemoryCachingLayer

EXACT = 1e-9


def make_layer(config: MCConfig, seed: int = 0) -> MemoryCachingLayer:
    """Build a layer in float64, with perturbed parameters."""
    layer = MemoryCachingLayer(config, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), nnx.state(layer))
    nnx.update(layer, moved)
    return layer


def parameters(layer: MemoryCachingLayer) -> dict[str, Any]:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))


def layer_oracle(
    p: dict[str, Any], config: MCConfig, x: Array, mask: Array | None
) -> tuple[Array, Array]:
    """Return output and gates of section 1 for x [b, t, d]."""
    b, t, d = x.shape
    h, memory = config.num_heads, config.memory
    x = x if mask is None else np.where(mask[:, :, None], x, 0.0)

    def heads(name: str) -> Array:
        y = x @ p[f"{name}_proj"]["kernel"]
        if config.conv_width and name in "qkv":
            kernel = p[f"{name}_conv"]["kernel"]  # [width, d], the last row weighs the token itself
            width = len(kernel)
            padded = np.concatenate([np.zeros((b, width - 1, d)), y], axis=1)
            y = np.stack([(padded[:, i : i + width] * kernel).sum(1) for i in range(t)], axis=1)
        y = y.reshape(b, t, h, -1)
        if config.normalizes_qk and name in "qk":
            y = y / np.sqrt((y * y).sum(-1, keepdims=True) + NORM_EPS)
        if name == "v" and config.value_norm == "l2":
            y = y / np.sqrt((y * y).sum(-1, keepdims=True) + NORM_EPS)
        if name == "v" and config.value_norm == "rms":
            y = y / np.sqrt((y * y).mean(-1, keepdims=True) + NORM_EPS)
        return y

    def coefficient(name: str) -> Array | None:
        if name not in memory.ranges:
            return None
        if memory.coefficients == "constant":
            return np.full((b, t, h), float(getattr(memory, name)))
        low, high = memory.ranges[name]
        low = memory.min_retention if name == "retention" else low
        at = p["coefficients"][name]
        logit = at["bias"] + (x @ at["kernel"] if memory.coefficients == "token" else 0.0)
        return np.broadcast_to(low + (high - low) / (1 + np.exp(-logit)), (b, t, h))

    q, k, v = (heads(name) for name in "qkv")
    u = None
    if config.gated:
        u = q if config.use_q_as_u else heads("u")
    initial = tuple(p["initial"][i] for i in sorted(p.get("initial", {})))
    norm = p.get("memory_norm")
    result = oracle.memory_caching(
        q,
        k,
        v,
        u,
        initial or (np.zeros((h, d // h, d // h)),),
        Coefficients(
            coefficient("newest" if memory.kind == "swla" else "step"),
            coefficient("retention"),
            coefficient("momentum"),
            coefficient("previous"),
        ),
        config,
        mask=mask,
        norm=None if norm is None else (norm["scale"], norm["bias"]),
        gate_bias=p.get("gate_bias"),
        temperature=np.exp(p["gate_temperature"]) if "gate_temperature" in p else None,
    )
    y = result.output
    if config.output_norm == "rms":
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + NORM_EPS) * p["output_norm"]["scale"]
    return y.reshape(b, t, d) @ p["out_proj"]["kernel"], result.gates


CONFIGS: dict[str, MCConfig] = {
    "linear": MCConfig(8, 2, LinearConfig(), "residual", segment_size=3),
    "linear-learned": MCConfig(
        8, 2, LinearConfig("elu+1", True, "head", 0.7, 0.8, True, min_retention=0.5), "soup",
        qk_norm="l2",
    ),
    "swla": MCConfig(
        8, 2, SWLAConfig(), "grm", conv_width=4, segment_size=3, chunk_size=2,
        value_norm="l2",
        gate_bias=0.5, pool_norm="l2", softmax_temperature="learned",
    ),
    "dla": MCConfig(
        8, 2, DLAConfig(2, 2), "ssc", ssc_top_k=1, use_q_as_u=True, segment_size=3, pooling="sum",
        gate="token", gate_bias=-0.5, softmax_temperature="learned",
    ),
    "titans": MCConfig(
        8, 2, TitansConfig(2, 2, retention_target="initial"), "soup", segment_size=4, chunk_size=3,
        gate="token", value_norm="rms",
    ),
    "titans-norm": MCConfig(
        8, 2, TitansConfig(2, 1, norm="layer", coefficients="head", min_retention=0.9), "grm",
        conv_width=2, segment_size=4, state_init_mode="restart", softmax_temperature=0.5,
        output_norm="none", gate_bias=1.0,
    ),
    "dla-plain": MCConfig(
        8, 2, DLAConfig(1, coefficients="constant", step=0.3), "mean", qk_norm="none",
        segmentation="logarithmic",
    ),
}  # fmt: skip
