"""Matrix products, norms and activations, in the precision of section 8 of the equations.

Dimensions: b batch, t tokens, d model width, h heads, k key width, v value width,
f hidden width, n segments, c tokens of a chunk or segment, g chunks, e rank-one updates of a
chunk, o and i output and input width of a weight. `...` are any leading axes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mc_core.config import NORM_EPS, UPDATE_EPS
from mc_core.memory_kinds import NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS

Array = torch.Tensor
Dtype = torch.dtype | None
# Matrix products without batch axes.
_WEIGHT_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of memory weights, pools and scores: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(x: Array) -> torch.dtype:
    """Return the compute dtype of x [...]: that of autocast if enabled, else that of x."""
    if x.dtype != torch.float64 and autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def einsum_f32(spec: str, *operands: Array, dtype: Dtype = None, exact: bool = False) -> Array:
    """Einsum of operands in the compute dtype, accumulated and returned in the state dtype.

    Args:
        spec: einsum subscripts.
        operands: arrays [...] with the axes of `spec`.
        dtype: compute dtype; None = the dtypes of the operands.
        exact: do not round float32 operands to TF32 on a GPU.
    """
    cast = [x if dtype is None else x.to(dtype) for x in operands]
    out = state_dtype(cast[0].dtype)
    # A bfloat16 product would round its result to bfloat16. A float32 product does not, and TF32
    # represents bfloat16 operands exactly.
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


def expand_leading_dims(x: Array, ndim: int) -> Array:
    """Prepend axes of length 1 to x [...] until it has `ndim` axes."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def maximum(x: Array, floor: float) -> Array:
    """Elementwise maximum of x [...] and a number; a tie gives x half the gradient, as in JAX."""
    return torch.maximum(x, torch.full((), floor, dtype=x.dtype, device=x.device))


def gelu(x: Array) -> Array:
    """Exact (erf) GELU of x [...]."""
    return F.gelu(x, approximate="none")


def gelu_slope(x: Array) -> Array:
    """Derivative of the exact GELU at x [...]."""
    density = torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
    return 0.5 * torch.erfc(-(2**-0.5) * x) + x * density


def l2_normalize(x: Array) -> Array:
    """Normalize the last axis of x [..., k] to unit L2 norm, computed in the state dtype."""
    x32 = x.to(state_dtype(x.dtype))
    squares = torch.sum(x32 * x32, dim=-1, keepdim=True)
    return (x32 * torch.rsqrt(squares + NORM_EPS)).to(x.dtype)


def rms_norm(x: Array, scale: Array) -> Array:
    """RMS norm over the last axis of x [..., *s]; `scale` has the shape [*s]."""
    x32 = x.to(state_dtype(x.dtype))
    inverse = torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + NORM_EPS)
    return (x32 * inverse * expand_leading_dims(scale.to(x32.dtype), x.ndim)).to(x.dtype)


def normalize_values(v: Array, norm: str) -> Array:
    """Normalize the last axis of v [..., v] to unit L2 norm (`l2`) or unit RMS (`rms`)."""
    if norm == "none":
        return v
    return l2_normalize(v) if norm == "l2" else rms_norm(v, v.new_ones(v.shape[-1:]))


def standardize(x: Array) -> tuple[Array, Array]:
    """Return x [..., v] with zero mean and unit variance, and 1 / standard deviation [..., 1]."""
    centred = x - torch.mean(x, dim=-1, keepdim=True)
    inverse = torch.rsqrt(torch.mean(centred * centred, dim=-1, keepdim=True) + NORM_EPS)
    return centred * inverse, inverse


def orthogonalize(x: Array) -> Array:
    """Return matrices with the singular vectors and the Frobenius norm of x [..., o, i].

    Newton-Schulz iterations make all singular values almost equal; those below 0.2% of the norm
    remain smaller. Matrices of norm 1e-6 or less are returned unchanged: at zero, the gradient
    would otherwise be infinite.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.transpose(-1, -2)).transpose(-1, -2)
    squares = torch.sum(x * x, dim=(-2, -1), keepdim=True)
    small = squares <= UPDATE_EPS
    norm = torch.sqrt(torch.where(small, 1.0, squares))
    unit = x / norm
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = einsum_f32("...oi,...pi->...op", unit, unit)
        factor = cubic * gram + quintic * einsum_f32("...op,...pq->...oq", gram, gram)
        unit = linear * unit + einsum_f32("...op,...pi->...oi", factor, unit)
    squares = torch.sum(unit * unit, dim=(-2, -1), keepdim=True)
    return torch.where(small, x, unit * (norm / torch.sqrt(torch.where(small, 1.0, squares))))


def remat(function: Callable[..., Any], policy: str = "full") -> Callable[..., Any]:
    """Recompute the intermediates of a function in the backward pass.

    Without effect under transforms of `torch.func`.

    Args:
        function: function of tensors.
        policy: `full`, or `dots`: do not recompute products of tokens with weights. `none`: return
            the function.
    """
    if policy == "none":
        return function
    contexts = partial(create_selective_checkpoint_contexts, list(_WEIGHT_PRODUCTS))
    options: dict[str, Any] = {"context_fn": contexts} if policy == "dots" else {}
    recomputed = _without_cast_cache(function)

    def run(*args: Any) -> Any:
        # torch.compile decides what to save; torch.func does not support hooks on saved tensors.
        if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(
            recomputed, *args, use_reentrant=False, preserve_rng_state=False, **options
        )

    return run


def _without_cast_cache(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function cast parameters itself under autocast.

    With casts cached by an earlier call, the recomputation would need more operations than the
    first pass, which PyTorch refuses.
    """

    def run(*args: Any) -> Any:
        enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return function(*args)
        finally:
            torch.set_autocast_cache_enabled(enabled)

    return run


def is_transformed() -> bool:
    """Return True inside a transform of `torch.func` (`grad`, `vmap`, `jvp`, ...)."""
    return torch._C._are_functorch_transforms_active()


def is_batched(x: Array) -> bool:
    """Return True if x [...] is batched by `torch.vmap`, so that its values are unknown."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def is_static(size: int) -> bool:
    """Return True if a size is a number, not a symbol of `torch.export`."""
    if not torch.compiler.is_exporting():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a slow import

    return has_static_value(size)


def take_along(x: Array, index: Array, dim: int) -> Array:
    """Return `torch.take_along_dim(x, index, dim)`; index [...] broadcasts along other axes."""
    # torch.take_along_dim would specialize a symbolic batch size of `torch.export`.
    shape = list(x.shape)
    shape[dim] = index.shape[dim]
    return torch.gather(x, dim, index.expand(shape))


def unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Return `x.unfold(dim, size, step)` of x [...]: windows along `dim` on a new last axis."""
    if not is_transformed():
        return x.unfold(dim, size, step)
    # torch.vmap has no batching rule for the gradient of `unfold`.
    count = (x.shape[dim] - size) // step + 1
    start, offset = (torch.arange(n, device=x.device) for n in (count, size))
    gathered = x.index_select(dim, (start[:, None] * step + offset).reshape(-1))
    return gathered.unflatten(dim, (count, size)).movedim(dim + 1, -1)


def tree_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply a function to the tensors of nested tuples. None is preserved."""
    if tree is None:
        return None
    if not isinstance(tree, tuple):
        return function(tree, *rest)
    leaves = [tree_map(function, *parts) for parts in zip(tree, *rest, strict=True)]
    return type(tree)(*leaves) if hasattr(tree, "_fields") else tuple(leaves)


def unstack(tree: Any, dim: int = 0) -> list[Any]:
    """Split the tensors of nested tuples along an axis, into one tree per index."""
    # `unbind` has a single backward; indexing one by one would create a full gradient per index.
    parts = tree_map(lambda x: list(x.unbind(dim)), tree)
    leaf = tree
    while isinstance(leaf, tuple):
        leaf = leaf[0]
    return [tree_map(lambda x, i=i: x[i], parts) for i in range(leaf.shape[dim])]


@torch.compiler.assume_constant_result
def _rounds_products() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def autocasts(x: Array) -> bool:
    """Return True if autocast is enabled for the device of x [...]."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
