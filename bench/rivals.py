"""Alternatives to this package as subjects on the same batch; each imports its own package."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from bench.batch import batch
from bench.timing import Subject
from bench.torch_layers import device, module_subject
from mc_core.config import MCConfig
from mc_core.errors import UserError
from mc_core.weights import Flat
from parity.community import from_community

INSTALL = "make bench-peers"


def need(package: str) -> str:
    """Return the version of an installed package.

    Raises:
        UserError: it is not installed.
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
        kind: `linear`, or `titans` with a hidden width of 64, the head's.
        aggregation: as in `MCConfig`.
        rows: sequences of the batch.
        tokens: tokens of each.
        backward: whether gradients are taken.
        seed: of the parameters and of the batch.

    Returns:
        The subject; our configuration of the same layer; its weights in PyTorch's layout, None
        where its mathematics differs (a zero initial memory with biases).
    """
    need("memory-caching")
    import memory_caching as theirs

    titans = theirs.TitansConfig(
        64,
        inner_update_mode="differentiable",
        update_convention="gradient_descent",
        retention_alpha=0.999,
        step_size=0.02,
        momentum=0.9,
    )
    names: dict[str, Any] = {"backend": kind, "aggregation": aggregation}
    config = theirs.MCConfig(256, 4, segment_size=64, titans=titans, **names)
    backend = theirs.LinearMemoryBackend() if kind == "linear" else theirs.TitansBackend(titans)
    torch.manual_seed(seed)
    layer = theirs.MemoryCachingLayer(config=config, backend=backend)
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
    need("titans-pytorch")
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

    JAX's comes once for each number of `devices`, over which its batch is split. In bfloat16 on a
    GPU, SDPA chooses a flash kernel and JAX's runs cuDNN's.
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
    from mc_jax.sharding import local, replicate, split_rows

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

    held = replicate(jnp.asarray(kernels, dtype), local(devices, "--devices", len(arrays[0])))
    args = (held, *split_rows([jnp.asarray(a, dtype) for a in arrays], held))
    rows, tokens, _ = arrays[0].shape
    name = named("jax dot_product_attention" + (", cuDNN" if cudnn else ""), devices)
    return compiled_subject(name, both, args, rows * tokens, dtype)


def flash_linear(kind: str, heads: int, tokens: int, seed: int = 0) -> Subject:
    """Return a layer of flash-linear-attention's `chunk_linear_attn` or `chunk_simple_gla`.

    A GPU alone runs it: one sequence, bfloat16, heads of 128.
    """
    need("flash-linear-attention")
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    torch.manual_seed(seed)
    width = 128 * heads
    arrays = batch(width, 1, tokens, seed)
    x, cotangent = (torch.from_numpy(a).to(device(), torch.bfloat16) for a in arrays)
    kernels = [
        torch.nn.Parameter(torch.randn(width, width, device=device()).bfloat16() / width**0.5)
        for _ in range(4)
    ]
    decay = torch.full((1, tokens, heads), float(np.log(0.99)), device=device())

    def mix(x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).unflatten(-1, (heads, 128)) for w in kernels[:3])
        if kind == "linear":
            y, _ = chunk_linear_attn(q, k, v, scale=1.0, normalize=False)
        else:
            y, _ = chunk_simple_gla(q, k, v, decay, scale=1.0)
        return y.flatten(2) @ kernels[3]

    return module_subject("flash-linear-attention", mix, kernels, x, cotangent, count=False)
