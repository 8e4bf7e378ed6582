"""Layers of `mc_torch` and their inputs."""

import torch

from mc_torch import MemoryCachingLayer


def make_layer(config, seed=0, dtype=torch.float64):
    """Build a layer with perturbed parameters."""
    torch.manual_seed(seed)
    layer = MemoryCachingLayer(config, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def draw(*shape, dtype=torch.float64, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator, **options)


class Extend(torch.nn.Module):
    """Module that calls `extend`, for `torch.export` and `functional_call`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, tokens, cache):
        return self.layer.extend(tokens, cache)
