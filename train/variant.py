"""Models of another configuration with the parameters of a trained one."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from mc_core.config import ModelConfig
from mc_core.errors import UserError
from mc_core.weights import leaves
from mc_jax import LanguageModel
from mc_jax.numerics import Dtype
from mc_jax.pretrained import get_weights, set_weights

SHOWN = 3  # parameters in an error message


def make_variant(
    model: LanguageModel,
    config: ModelConfig,
    words: Sequence[str],
    dtype: Dtype = None,
) -> LanguageModel:
    """Return a model with another configuration and the parameters of `model`.

    Parameters that the new configuration does not use are dropped.

    Args:
        model: trained model.
        config: the new configuration.
        words: overrides that led to it, for the error message.
        dtype: compute dtype; None = that of `model`.

    Raises:
        UserError: the configuration needs a parameter that `model` does not have, or has with
            another shape.
    """
    dtype = jnp.dtype(model.dtype if dtype is None else dtype)
    flat = get_weights(model)
    param_dtype = next(iter(flat.values())).dtype

    variant = LanguageModel(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    given, wanted = leaves(flat), leaves(get_weights(variant))
    lacking = []
    for name, leaf in wanted.items():
        trained = given.get(name)
        if trained is None:
            lacking.append(f"{name} {list(leaf.shape)}")
        elif trained.shape != leaf.shape:
            lacking.append(f"{name} {list(leaf.shape)} (trained: {list(trained.shape)})")
    if lacking:
        more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
        raise UserError(
            f"{' '.join(words)}: needs parameters that the trained model does not have: "
            f"{', '.join(lacking[:SHOWN])}{more}; train a run with this configuration"
        )
    set_weights(variant, {name: flat[name] for name in wanted})
    return variant
