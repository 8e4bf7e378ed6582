"""Initial state from the weights of another run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from mc_core.errors import UserError
from mc_core.tree_utils import flatten
from train.checkpoint import load_state
from train.config import TrainConfig, to_dict
from train.data.tokenizer_copy import tokenizer_hash
from train.stacked import stack_like, unstack_blocks
from train.step import TrainState, averaged


def initial_state(config: TrainConfig, state: TrainState, console: Console) -> TrainState:
    """Return `state` with the parameters of `run.init_from`, and print a message.

    They are the average of the parameters if the run has one. With `run.init_optimizer`, also the
    moments and their step count. The schedule starts at 0. The other run is not changed.

    Args:
        config: configuration of the new run, with `run.init_from`.
        state: state before the first step.
        console: output console.

    Raises:
        UserError: there is no checkpoint, its parameters have other names or shapes, or its moments
            those of another optimizer.
    """
    run = config.run
    assert run.init_from is not None
    if Path(run.init_from).resolve() == Path(run.directory).resolve():
        raise UserError(f"run.init_from = {run.init_from}: must not be this run's own directory")
    try:
        mesh = jax.tree.leaves(state.params)[0].sharding.mesh
        source, _, found, step, meta = load_state(Path(run.init_from), mesh)
    except UserError as error:
        raise UserError(f"run.init_from: {error}") from error
    differences = _differences(source, config)
    if (words := _tokens(source, meta.tokenizer)) != (
        own := _tokens(config, tokenizer_hash(config))
    ):
        differences.append(f"its tokens are {words} there and {own} here")
    single = unstack_blocks(jax.eval_shape(lambda state: state, state))
    if mismatch := _mismatch(found.params, single.params):
        raise UserError(
            f"run.init_from = {run.init_from}: has another architecture: {mismatch}; "
            f"{'; '.join(differences)}"
        )
    what = "parameters"
    optimizer = state.optimizer
    if run.init_optimizer:
        what = "parameters and moments"
        if _structure(found.optimizer) != _structure(single.optimizer):
            names = [(c.optimizer.name, c.optimizer.moment_dtype) for c in (source, config)]
            raise UserError(
                f"run.init_optimizer = True: the optimizer of {run.init_from} is "
                f"{' with moments in '.join(names[0])}, and that of this run is "
                f"{' with moments in '.join(names[1])}: they must be the same"
            )
        optimizer = stack_like(restart_schedule(found.optimizer), state.optimizer)
    console.print(
        f"starting from the {what} of step {step} of {run.init_from}"
        + (f"; {'; '.join(differences)}" if differences else ""),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    params = jax.tree.map(
        lambda x, own: x if x.dtype == own.dtype else jax.jit(lambda x: x.astype(own.dtype))(x),
        averaged(found, source).params,
        single.params,
    )
    return state._replace(params=stack_like(params, state.params), optimizer=optimizer)


def _structure(state: optax.OptState) -> Any:
    """Return paths and dtypes of the arrays of an optimizer state."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), leaf.dtype) for path, leaf in leaves]


def restart_schedule(state: optax.OptState) -> optax.OptState:
    """Return an optimiser state with the schedule reset to step 0."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def restart(node: Any) -> Any:
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    return jax.tree.map(restart, state, is_leaf=is_schedule)


def _mismatch(old: Any, new: Any) -> str:
    """Return the first parameter with another name or shape, or an empty string."""
    shapes = [{name: list(leaf.shape) for name, leaf in flatten(tree)} for tree in (old, new)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = (found.get(name, "missing") for found in shapes)
        if there != here:
            return f"{name} is {there} there and {here} here"
    return ""


def _differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Return a description of each model setting that differs."""
    settings = [dict(flatten({"model": to_dict(c)["model"]})) for c in (old, new)]
    return [
        f"{key} is {settings[0].get(key)} there and {settings[1].get(key)} here"
        for key in sorted(settings[0].keys() | settings[1].keys())
        if settings[0].get(key) != settings[1].get(key)
    ]


def _tokens(config: TrainConfig, file_hash: str | None) -> str:
    """Return a description of the tokenizer of a run; equal for equal tokenizers."""
    if file_hash is not None:
        return f"those of a tokenizer with SHA-256 {file_hash[:12]}"
    return getattr(config.data, "tokenizer", f"those of the task {config.data.task}")
