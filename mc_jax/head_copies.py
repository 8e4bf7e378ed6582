"""Projections of tokens to heads that are sharded over devices.

The gradient of the tokens is a sum over the projections to q, k, v, u and the coefficients. XLA
would reduce each of its terms over the devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType

from mc_jax.numerics import Array, Dtype
from mc_jax.sharding import FREE, constrain


class HeadCopies(NamedTuple):
    """Tokens with one copy per shard of the mesh axis `heads`, on the devices of the shard.

    Projections of the copies use the shard's columns only. In the backward pass, the gradients of
    all projections of the tokens are added on each device before the devices reduce their sum once.
    """

    tokens: Array  # [b, t, d]
    copies: Array  # [g, b, t, d], sharded over g

    def project(self, kernel: Array, dtype: Dtype) -> Array:
        """Map [b, t, d] to [b, t, out] in `dtype`, accumulated in it."""
        kernel = kernel.astype(self.tokens.dtype)
        shards, (width, features) = len(self.copies), kernel.shape
        if features % shards:  # the keys and values have fewer heads than there are shards
            return jnp.einsum("btd,df->btf", self.tokens, kernel, preferred_element_type=dtype)
        columns = kernel.reshape(width, shards, features // shards)
        y = jnp.einsum("gbtd,dgf->btgf", self.copies, columns, preferred_element_type=dtype)
        return y.reshape(*self.tokens.shape[:2], features)


def copy_to_heads(x: Array, heads: int) -> Array | HeadCopies:
    """Return tokens [b, t, d] for several projections to `heads` heads.

    Without a mesh (`jax.set_mesh`) whose axis `heads` is of type Auto, the tokens themselves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    shards = mesh.shape.get("heads", 1)
    if shards == 1 or heads % shards or kinds["heads"] != AxisType.Auto:
        return x
    copies = jnp.broadcast_to(x[None], (shards, *x.shape))
    return HeadCopies(x, constrain(copies, "heads", "batch", FREE, None))


def apply_to(module: nnx.Module, x: Array | HeadCopies) -> Array:
    """Project tokens [b, t, d]; a module that does not take copies is called on the tokens.

    Such a module may be a projection that users have wrapped.
    """
    if isinstance(x, HeadCopies) and not getattr(module, "_takes_copies", False):
        return module(x.tokens)
    return module(x)
