"""Products, norms and activations with the precision that section 8 of the equations fixes.

Shapes use one legend: b batch, t tokens, d model width, h heads, k key width, v value width,
f hidden width, n segments, c tokens of a chunk or segment, g chunks, e write events of a chunk,
o and i a weight's output and input width. `...` stands for any leading axes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mc_core.config import NORM_EPS

Array = torch.Tensor
Dtype = torch.dtype | None


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of memory weights, pools and scores: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(x: Array) -> torch.dtype:
    """Return the dtype of products with x [...]: autocast's where it is on, else that of x."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def product(spec: str, *operands: Array, dtype: Dtype = None, exact: bool = False) -> Array:
    """Einsum with operands in the compute dtype; accumulates and returns the state dtype.

    Args:
        spec: einsum subscripts.
        operands: the factors, each [...] as `spec` says.
        dtype: compute dtype; None keeps the operands' own.
        exact: full float32 products, where a GPU may round their factors (TF32).
    """
    cast = [x if dtype is None else x.to(dtype) for x in operands]
    out = state_dtype(cast[0].dtype)
    # A product of two bfloat16 matrices would be rounded to bfloat16 at its end. Their float32
    # product is not, and TF32, where it is allowed, holds bfloat16 factors without loss.
    wide = torch.float64 if exact and _rounds_products() else out
    cast = [x.to(wide) for x in cast]
    if not autocasts(cast[0]):
        return torch.einsum(spec, *cast).to(out)
    with torch.autocast(cast[0].device.type, enabled=False):
        return torch.einsum(spec, *cast).to(out)


def running_sum(x: Array) -> Array:
    """Cumulative sum over the tokens of [..., c, k]."""
    return torch.cumsum(x, dim=-2)


def scale_rows(scale: Array, x: Array) -> Array:
    """Return `scale[..., None] * x` in the dtype of `scale` [..., c]; x is [..., c, i]."""
    return scale[..., None] * x.to(scale.dtype)


def align(x: Array, ndim: int) -> Array:
    """Prepend axes of length 1 to x [...] until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def maximum(x: Array, floor: float) -> Array:
    """Elementwise maximum of x [...] and a number; at a tie each side gets half the gradient."""
    return torch.maximum(x, torch.full((), floor, dtype=x.dtype, device=x.device))


def gelu(x: Array) -> Array:
    """Exact (erf) GELU of x [...], elementwise."""
    return F.gelu(x, approximate="none")


def gelu_slope(x: Array) -> Array:
    """Derivative of the exact GELU at x [...], elementwise."""
    density = torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
    return 0.5 * torch.erfc(-(2**-0.5) * x) + x * density


def l2_normalize(x: Array) -> Array:
    """Scale the last axis of x [..., k] to unit length, computed in the state dtype."""
    x32 = x.to(state_dtype(x.dtype))
    squares = torch.sum(x32 * x32, dim=-1, keepdim=True)
    return (x32 * torch.rsqrt(squares + NORM_EPS)).to(x.dtype)


def rms_norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis of x [..., *s]; `scale` has the shape [*s]."""
    x32 = x.to(state_dtype(x.dtype))
    inverse = torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + NORM_EPS)
    return (x32 * inverse * align(scale.to(x32.dtype), x.ndim)).to(x.dtype)


def standardize(x: Array) -> tuple[Array, Array]:
    """Return x [..., v] with zero mean and unit variance, and the inverse deviation [..., 1]."""
    centred = x - torch.mean(x, dim=-1, keepdim=True)
    inverse = torch.rsqrt(torch.mean(centred * centred, dim=-1, keepdim=True) + NORM_EPS)
    return centred * inverse, inverse


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute a function in the backward pass in place of keeping what it computed.

    Under a transform of `torch.func`, everything computed is kept.
    """

    def run(*args: Any) -> Any:
        # A compiler decides by itself what it keeps; torch.func has no hooks on saved tensors.
        if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def is_transformed() -> bool:
    """Whether a transform of `torch.func` (`grad`, `vmap`, `jvp`, ...) is running."""
    return torch._C._are_functorch_transforms_active()


def is_batched(x: Array) -> bool:
    """Whether x [...] is one of several under `torch.vmap`, so that no value of it is known."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_fixed(size: int) -> bool:
    """Whether a size is a number: `torch.export` has symbols for dynamic ones."""
    if not torch.compiler.is_exporting():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a slow import

    return has_static_value(size)


def take_along(x: Array, index: Array, dim: int) -> Array:
    """Return `torch.take_along_dim(x, index, dim)`; index [...] broadcasts along other axes."""
    # That function would make a symbolic batch size, as `torch.export` has it, a number.
    shape = list(x.shape)
    shape[dim] = index.shape[dim]
    return torch.gather(x, dim, index.expand(shape))


def windows(x: Array, dim: int, size: int, step: int) -> Array:
    """Return `x.unfold(dim, size, step)` of x [...]: windows along `dim`, on a new last axis."""
    if not is_transformed():
        return x.unfold(dim, size, step)
    # torch.vmap has no batching rule for the gradient of `unfold`.
    count = (x.shape[dim] - size) // step + 1
    start, place = (torch.arange(n, device=x.device) for n in (count, size))
    taken = x.index_select(dim, (start[:, None] * step + place).reshape(-1))
    return taken.unflatten(dim, (count, size)).movedim(dim + 1, -1)


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply a function to the tensors of nested tuples; None stays None."""
    if tree is None:
        return None
    if not isinstance(tree, tuple):
        return function(tree, *rest)
    leaves = [tree_map(function, *parts) for parts in zip(tree, *rest, strict=True)]
    return type(tree)(*leaves) if hasattr(tree, "_fields") else tuple(leaves)


def unstack(tree: Any, dim: int = 0) -> list[Any]:
    """Split the tensors of nested tuples along an axis, into one tree a place."""
    # Unbound at once: indexing place by place would add a full gradient for every one.
    parts = tree_map(lambda x: list(x.unbind(dim)), tree)
    leaf = tree
    while isinstance(leaf, tuple):
        leaf = leaf[0]
    return [tree_map(lambda x, i=i: x[i], parts) for i in range(leaf.shape[dim])]


@torch.compiler.assume_constant_result
def _rounds_products() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def autocasts(x: Array) -> bool:
    """Whether autocast is on for the device of x [...]."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
