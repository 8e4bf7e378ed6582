"""Optimizers and learning-rate schedules in Optax from a configuration."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mc_core.optimizer import OptimizerConfig, decays, is_orthogonalized
from train.stacked import is_stacked

UPDATE_RMS = 0.2  # of AdamW's updates; Muon's are scaled to it


def decay_mask(params: Any) -> Any:
    """Return the weight decay mask: True for matrices of projections and embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: decays(str(path[-1].key), leaf.ndim - is_stacked(path)), params
    )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate schedule; steps are counted from 0."""
    peak, warmup = config.learning_rate, config.warmup_steps
    first, last = peak / (warmup + 1), peak * config.final_fraction
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=steps,
            end_value=last,
        )
    decay = round(config.decay_fraction * steps) if config.schedule == "wsd" else 0
    begin = max(warmup, steps - decay)
    parts = [optax.linear_schedule(first, peak, warmup), optax.constant_schedule(peak)]
    if decay:
        parts.append(optax.linear_schedule(peak, last, steps - begin))
    return optax.join_schedules(parts, [warmup, begin][: len(parts) - 1])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimizer with clipping by global norm.

    Moments are float32, or have `config.moment_dtype`; so are updates, for parameters of any dtype.
    """
    clip = config.clip_norm
    return _in_float32(
        optax.chain(
            optax.identity() if clip is None else optax.clip_by_global_norm(clip),
            _MAKERS[config.name](config, make_schedule(config, steps)),
        )
    )


def _adamw(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        rates,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        mu_dtype=_moment_dtype(config),
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _lion(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(
        rates,
        b1=config.beta1,
        b2=config.beta2,
        mu_dtype=_moment_dtype(config),
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "muon" if is_orthogonalized([str(k.key) for k in path]) else "adamw",
            params,
        )

    def axes(params: Any) -> Any:
        # Axes before the last two, such as that of stacked blocks, count matrices.
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), params)

    orthogonalized = muon(
        rates,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        mu_dtype=_moment_dtype(config),
        muon_weight_dimension_numbers=axes,
        consistent_rms=UPDATE_RMS,
    )
    return optax.partition({"muon": orthogonalized, "adamw": _adamw(config, rates)}, labels)


_MAKERS = {"adamw": _adamw, "lion": _lion, "muon": _muon}


def _moment_dtype(config: OptimizerConfig) -> Any:
    """Return the dtype of the first moment; None = that of the parameters."""
    return None if config.moment_dtype == "float32" else jnp.dtype(config.moment_dtype)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Compute in at least float32, for parameters of fewer bits."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return optimizer.update(widen(updates), state, None if params is None else widen(params))

    return optax.GradientTransformation(lambda params: optimizer.init(widen(params)), update)


_SHAPES = {
    "cosine": "on the cosine over {} steps",
    "wsd": "on the constant and final decay over {} steps",
    "constant": "constant over {} steps",
}


def describe_extension(config: OptimizerConfig, step: int, old: int, new: int) -> str:
    """Return a message about the learning rates of an extended run.

    Args:
        config: configuration of the optimizer.
        step: step of the checkpoint, at least 1.
        old: previous `run.steps`.
        new: new `run.steps`.
    """
    before = float(make_schedule(config, old)(step - 1))
    after, last = (float(make_schedule(config, new)(at)) for at in (step, new - 1))
    return (
        f"run.steps grows from {old} to {new}: the learning rate is {before:.3g} at step {step}, "
        f"{after:.3g} at step {step + 1}, and {last:.3g} at step {new}, "
        f"{_SHAPES[config.schedule].format(new)}"
    )
