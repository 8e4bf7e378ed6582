"""AdamW in Optax from a configuration."""

from typing import Any

import jax
import optax

from mc_core.optimizer import OptimizerConfig, decays


def decay_mask(params: Any) -> Any:
    """Return the weight decay mask: True for matrices of projections and embeddings."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: decays(str(path[-1].key), leaf.ndim), params
    )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate schedule; steps are counted from 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return AdamW with clipping by global norm."""
    clip = config.clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def describe_extension(config: OptimizerConfig, step: int, old: int, new: int) -> str:
    """Return a message about the learning rates of an extended run.

    Args:
        config: configuration of the optimiser.
        step: step of the checkpoint, at least 1.
        old: previous `run.steps`.
        new: new `run.steps`.
    """
    before = float(make_schedule(config, old)(step - 1))
    after, last = (float(make_schedule(config, new)(at)) for at in (step, new - 1))
    return (
        f"run.steps grows from {old} to {new}: the learning rate is {before:.3g} at step {step}, "
        f"{after:.3g} at step {step + 1}, and {last:.3g} at step {new}, on the cosine over {new} "
        "steps"
    )
