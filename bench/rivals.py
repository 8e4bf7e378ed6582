"""Alternative packages as subjects on the same batch; packages are imported lazily."""

import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor as Array

from bench.batch import batch
from bench.timing import Subject
from bench.torch_layers import device, module_subject
from mc_core.config import MCConfig
from mc_core.errors import UserError
from mc_core.weights import Flat
from parity.community import from_community

INSTALL = "make bench-peers"


def require(package: str) -> str:
    """Return the version of an installed package.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise UserError(f"{package} is not installed: {INSTALL}") from error


def published(
    kind: str, aggregation: str, rows: int, tokens: int, *, backward: bool = True, seed: int = 0
) -> tuple[Subject, MCConfig, Flat | None]:
    """Return a layer of `memory-caching` 0.1.0: width 256, 4 heads, segments of 64.

    Args:
        kind: `linear`, or `titans` with a hidden width of 64, the head width.
        aggregation: as in `MCConfig`.
        rows: number of sequences.
        tokens: number of tokens per sequence.
        backward: compute gradients.
        seed: random seed of parameters and batch.

    Returns:
        The subject; the equivalent configuration of this package; and the weights in PyTorch's
        layout, None if there is no exact equivalent (a zero initial memory with biases).
    """
    require("memory-caching")
    import memory_caching as peer

    titans = peer.TitansConfig(
        64,
        inner_update_mode="differentiable",
        update_convention="gradient_descent",
        retention_alpha=0.999,
        step_size=0.02,
        momentum=0.9,
    )
    names: dict[str, Any] = {"backend": kind, "aggregation": aggregation}
    config = peer.MCConfig(256, 4, segment_size=64, titans=titans, **names)
    backend = peer.LinearMemoryBackend() if kind == "linear" else peer.TitansBackend(titans)
    torch.manual_seed(seed)
    layer = peer.MemoryCachingLayer(config=config, backend=backend)
    initial: list[torch.Tensor] = []
    if kind == "titans":
        initial = [torch.randn(4, 64, 64) / 8 for _ in range(2)]
    ours, flat = from_community(layer.config, layer.state_dict(), initial)
    x, cotangent = (torch.from_numpy(a) for a in batch(256, rows, tokens, seed))
    subject = module_subject(
        "memory-caching 0.1.0",
        layer,
        layer.parameters(),
        x,
        cotangent if backward else None,
        count=False,
    )
    return subject, ours, flat


def titans_pytorch(
    chunk_size: int, rows: int, tokens: int, *, backward: bool = True, seed: int = 0
) -> Subject:
    """Return `NeuralMemory` of titans-pytorch: width 256, 4 heads of 64, depth 2, expansion 4."""
    require("titans-pytorch")
    from titans_pytorch import NeuralMemory

    torch.manual_seed(seed)
    memory = NeuralMemory(
        dim=256,
        chunk_size=chunk_size,
        dim_head=64,
        heads=4,
        default_model_kwargs={"depth": 2, "expansion_factor": 4.0},
    ).to(device())
    x, cotangent = (torch.from_numpy(a).to(device()) for a in batch(256, rows, tokens, seed))
    return module_subject(
        "titans-pytorch",
        lambda x: memory(x)[0],
        memory.parameters(),
        x,
        cotangent if backward else None,
        count=False,
    )


def attention(
    width: int,
    heads: int,
    rows: int,
    tokens: int,
    *,
    devices: Sequence[int] = (1,),
    dtype: str = "float32",
    seed: int = 0,
) -> list[Subject]:
    """Return causal softmax attention layers, projections included: torch's SDPA, and JAX's.

    The JAX layer is returned for each number of `devices`, over which the batch is split. In
    bfloat16 on a GPU, SDPA selects a flash kernel, and JAX uses cuDNN.
    """
    rng = np.random.default_rng(seed)
    kernels = rng.standard_normal((4, width, width), np.float32) / width**0.5
    arrays = batch(width, rows, tokens, seed)
    to = {"device": device(), "dtype": getattr(torch, dtype)}
    x, cotangent = (torch.from_numpy(a).to(**to) for a in arrays)
    parameters = [torch.nn.Parameter(torch.from_numpy(k).to(**to)) for k in kernels]

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            (x @ w).unflatten(-1, (heads, width // heads)).transpose(1, 2) for w in parameters[:3]
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(2) @ parameters[3]

    theirs = module_subject("torch SDPA", attend, parameters, x, cotangent, count=False)
    return [theirs, *(_jax_attention(kernels, arrays, heads, count, dtype) for count in devices)]


def _jax_attention(
    kernels: np.ndarray,
    arrays: tuple[np.ndarray, np.ndarray],
    heads: int,
    devices: int,
    dtype: str,
) -> Subject:
    import jax
    import jax.numpy as jnp

    from bench.devices import named
    from bench.jax_layers import compiled_subject
    from mc_jax.sharding import axes_sharding, local, make_mesh, split_rows

    cudnn = jax.default_backend() == "gpu" and dtype != "float32"
    implementation: Any = "cudnn" if cudnn else None

    def attend(kernels: jax.Array, x: jax.Array) -> jax.Array:
        b, t, d = x.shape
        q, k, v = ((x @ w).reshape(b, t, heads, d // heads) for w in kernels[:3])
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return y.reshape(b, t, d) @ kernels[3]

    def both(kernels: jax.Array, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pull = jax.vjp(attend, kernels, x)
        return y, *pull(cotangent)

    mesh = make_mesh(devices=local(devices, "--devices", len(arrays[0])))
    replicated = jax.device_put(jnp.asarray(kernels, dtype), axes_sharding(mesh))
    args = (replicated, *split_rows([jnp.asarray(a, dtype) for a in arrays], replicated))
    rows, tokens, _ = arrays[0].shape
    name = named("jax dot_product_attention" + (", cuDNN" if cudnn else ""), devices)
    return compiled_subject(name, both, args, rows * tokens, dtype)


def flash_linear(kind: str, heads: int, tokens: int, seed: int = 0) -> Subject:
    """Return a layer of flash-linear-attention's kernels.

    Requires a GPU. One sequence, bfloat16, heads of width 128.

    Args:
        kind: `linear` (`chunk_linear_attn`), `gla` (`chunk_simple_gla`) or `delta`
            (`chunk_gated_delta_rule`).
        heads: number of heads.
        tokens: number of tokens.
        seed: random seed of parameters and batch.
    """
    require("flash-linear-attention")
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def mix(q: Array, k: Array, v: Array, step: Array, decay: Array) -> Array:
        if kind == "linear":
            return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]
        if kind == "gla":
            return chunk_simple_gla(q, k, v, decay, scale=1.0)[0]
        return chunk_gated_delta_rule(q, k, v, decay, step, scale=1.0)[0]

    return _flash_layer(mix, (1, tokens, heads, 128), torch.bfloat16, seed)


def flash_delta_naive(heads: int, rows: int, tokens: int, seed: int = 0) -> Subject:
    """Return a layer of flash-linear-attention's chunked gated delta rule in plain PyTorch.

    Width 256 and float32, as for the other subjects on a CPU; chunks of 64.
    """
    require("flash-linear-attention")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a GPU, its import warns
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    def mix(q: Array, k: Array, v: Array, step: Array, decay: Array) -> Array:
        return naive_chunk_gated_delta_rule(q, k, v, decay, step, scale=1.0)[0]

    return _flash_layer(mix, (rows, tokens, heads, 256 // heads), torch.float32, seed)


def _flash_layer(
    mix: Callable[..., Array], shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int
) -> Subject:
    """Return projections around a function of q, k, v [b, t, h, k], steps and log decay [b, t, h].

    Keys are normalised for the delta rule; coefficients are constants.
    """
    rows, tokens, heads, head_width = shape
    torch.manual_seed(seed)
    width = head_width * heads
    x, cotangent = (torch.from_numpy(a).to(device(), dtype) for a in batch(width, rows, tokens))
    kernels = [
        torch.nn.Parameter((torch.randn(width, width) / width**0.5).to(device(), dtype))
        for _ in range(4)
    ]
    decay = torch.full(shape[:3], float(np.log(0.99)), device=device())
    step = torch.full(shape[:3], 0.5, device=device())

    def layer(x: Array) -> Array:
        q, k, v = ((x @ w).unflatten(-1, (heads, head_width)) for w in kernels[:3])
        q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q, k))
        return mix(q, k, v, step, decay).to(dtype).flatten(2) @ kernels[3]

    return module_subject("flash-linear-attention", layer, kernels, x, cotangent, count=False)
