"""`mc_torch.memory_caching` on a `cases.FunctionCase`: the mirror of `jax_calls`."""

from typing import Any

import numpy as np
import torch

from helpers.cases import FunctionCase
from mc_torch import Coefficients, Result, memory_caching
from mc_torch.numerics import tree_map

torch.set_num_threads(1)  # tiny tensors: threads would not help


def arrays(case: FunctionCase, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return the differentiable inputs as tensors; parameters stay at least float32."""
    wide = dtype if dtype == torch.float64 else torch.float32

    def to(tree: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda x: torch.tensor(x, dtype=dtype, requires_grad=True), tree)

    return {
        **{name: to(getattr(case, name), dtype) for name in "qkvu"},
        "initial": to(case.initial, wide),
        "coefficients": Coefficients(*to(tuple(case.coefficients), wide)),
        "norm": to(case.norm, wide),
        "gate_bias": to(case.gate_bias, wide),
    }


def call(inputs: dict[str, Any], case: FunctionCase, method: str = "chunked") -> Result:
    """Run `memory_caching` on inputs from `arrays`."""
    mask = None if case.mask is None else torch.tensor(case.mask)
    return memory_caching(
        **inputs, config=case.config, mask=mask, segment_lengths=case.lengths, method=method
    )


def run(case: FunctionCase, method: str = "chunked", dtype: torch.dtype = torch.float64) -> Result:
    """Run a case without recording gradients."""
    with torch.no_grad():
        return call(arrays(case, dtype), case, method)


def gradients(case: FunctionCase, method: str = "chunked") -> dict[str, Any]:
    """Return the gradients of every input under random cotangents, as NumPy arrays."""
    inputs = arrays(case)
    grads = iter(
        torch.autograd.grad(
            projected(call(inputs, case, method)), leaves(inputs), materialize_grads=True
        )
    )
    return {name: tree_map(lambda _: next(grads).numpy(), tree) for name, tree in inputs.items()}


def projected(result: Result, seed: int = 0) -> torch.Tensor:
    """Return the inner product of all results, including caches, with random cotangents."""
    rng = np.random.default_rng(seed)
    parts = [leaf for leaf in leaves(result) if leaf.is_floating_point()]
    return sum((leaf * torch.tensor(rng.standard_normal(leaf.shape))).sum() for leaf in parts)


def leaves(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of nested dictionaries and tuples."""
    if tree is None or isinstance(tree, torch.Tensor):
        return [] if tree is None else [tree]
    return [leaf for x in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(x)]
