"""Detection of non-finite values on the device, without a transfer to the host at every step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mc_core.errors import NotFiniteError
from train.stacked import finite_flags, parameter_names

Tree = Any


class Faults(NamedTuple):
    """The first non-finite value since the state was created or restored; scalars."""

    steps: jax.Array  # int32: number of steps so far
    step: jax.Array  # int32: number of the step with the value, from 1; 0 = none
    tensor: jax.Array  # int32: index into `tensor_names`
    loss: jax.Array  # float32: of that step
    grad_norm: jax.Array  # float32: of that step, before clipping


def no_faults() -> Faults:
    """Return the record before the first step."""
    counts = (jnp.zeros((), jnp.int32) for _ in range(3))
    values = (jnp.zeros((), jnp.float32) for _ in range(2))
    return Faults(*counts, *values)  # separate buffers: a step donates them


def detect(
    faults: Faults, loss: jax.Array, grad_norm: jax.Array, gradient: Tree, params: Tree
) -> tuple[jax.Array, Faults]:
    """Update the record after a step.

    Args:
        faults: record before the step.
        loss: loss of the step, a scalar.
        grad_norm: norm of the gradient, a scalar.
        gradient: gradient of the step.
        params: parameters after the step.

    Returns:
        a bool scalar, True if neither this step nor one before it met a non-finite value, and the
        new record.
    """
    flags = jax.tree.leaves((finite_flags(gradient), finite_flags(params), jnp.isfinite(loss)))
    finite = jnp.concatenate([flag.reshape(-1) for flag in flags])
    steps = faults.steps + 1
    found = Faults(
        steps,
        steps,
        finite.argmin().astype(jnp.int32),
        loss.astype(jnp.float32),
        grad_norm.astype(jnp.float32),
    )
    was_good = faults.step == 0
    is_new = was_good & ~finite.all()
    kept = faults._replace(steps=steps)
    return was_good & finite.all(), jax.tree.map(
        lambda new, old: jnp.where(is_new, new, old), found, kept
    )


def tensor_names(params: Tree) -> list[str]:
    """Return the names of the tensors in which `detect` looks for non-finite values."""
    names = parameter_names(params)
    return [f"{kind} of {name}" for kind in ("gradient", "parameter") for name in names] + [
        "the loss"
    ]


def check_finite(faults: Faults, names: Sequence[str], start: int, last_good: int) -> None:
    """Raise an error if a step met a non-finite value.

    Args:
        faults: record after the last step, on the host.
        names: names of the tensors, from `tensor_names`.
        start: step of the state in which the record began.
        last_good: step of the last checkpoint.

    Raises:
        NotFiniteError: the message has the step, the loss and the first non-finite tensor.
    """
    if not faults.step:
        return
    raise NotFiniteError(
        f"step {start + int(faults.step)}: {names[int(faults.tensor)]} is not finite "
        f"(loss {float(faults.loss):.4g}, gradient norm {float(faults.grad_norm):.4g}); "
        f"the last good checkpoint is step {last_good}"
    )
