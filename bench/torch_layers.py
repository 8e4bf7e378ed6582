"""Layers of `mc_torch` as subjects: outputs and gradients on the batch of `jax_layers`."""

from collections.abc import Callable, Iterable

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.batch import batch
from bench.timing import Subject
from mc_core.config import LayerConfig
from mc_core.weights import Flat
from mc_torch.mixer import Mixer
from mc_torch.model import LAYERS
from parity.weights import load_torch


def build(config: LayerConfig, flat: Flat | None = None, seed: int = 0) -> Mixer:
    """Return a float32 layer, with random or given weights."""
    torch.manual_seed(seed)
    layer: Mixer = LAYERS[type(config)](config, device=device())
    if flat is not None:
        load_torch(layer, flat)
    return layer


def device() -> str:
    """Return the device of torch subjects."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def subject(
    config: LayerConfig,
    rows: int,
    tokens: int,
    *,
    dtype: str = "float32",
    backward: bool = True,
    flat: Flat | None = None,
    seed: int = 0,
    name: str = "torch",
) -> Subject:
    """Return a layer as a subject; arguments as in `jax_layers.subject`."""
    layer = build(config, flat, seed)
    if dtype != "float32":
        layer.to(getattr(torch, dtype))
    arrays = batch(config.d_model, rows, tokens, seed)
    x, cotangent = (torch.from_numpy(a).to(device(), getattr(torch, dtype)) for a in arrays)
    return module_subject(name, layer, layer.parameters(), x, cotangent if backward else None)


def module_subject(
    name: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    parameters: Iterable[torch.Tensor],
    x: torch.Tensor,
    cotangent: torch.Tensor | None,
    *,
    count: bool = True,
) -> Subject:
    """Return a function as a subject that computes its output, and gradients of all inputs.

    Args:
        name: name in tables.
        function: function of tokens [b, t, d].
        parameters: parameters; unused ones get None as gradient.
        x: tokens [b, t, d].
        cotangent: [b, t, d]; None: compute only the output.
        count: count FLOPs with torch's counter, and bytes on a GPU.
    """
    x = x.clone().requires_grad_(cotangent is not None)
    wanted = [x, *(p for p in parameters if p.requires_grad)]

    def run() -> list[torch.Tensor | None]:
        made: list[torch.Tensor | None]
        if cotangent is None:
            with torch.no_grad():
                made = [function(x)]
        else:
            for tensor in wanted:
                tensor.grad = None
            y = function(x)
            y.backward(cotangent)
            made = [y.detach(), *(tensor.grad for tensor in wanted)]
        if x.is_cuda:
            torch.cuda.synchronize()
        return made

    flops = held = None
    if count:
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            run()
        flops = float(counter.get_total_flops())
        held = torch.cuda.max_memory_allocated() if x.is_cuda else None
    tokens = x.shape[0] * x.shape[1]
    dtype = str(x.dtype).removeprefix("torch.")
    return Subject(name, run, tokens, flops=flops, bytes=held, dtype=dtype)
