"""What a user would pick instead, as subjects on the same batch; each imports its own package."""

from importlib.metadata import PackageNotFoundError, version

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
        where its maths cannot be ours (a zero initial memory with biases).
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
    config = theirs.MCConfig(
        256, 4, backend=kind, aggregation=aggregation, segment_size=64, titans=titans
    )
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
        about="all gradients of a batch are taken at the first weights",
    )
