"""Losses, and one optimiser step as a pure function of the training state."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mc_jax import LanguageModel
from mc_jax.sharding import axes_sharding
from train.config import TrainConfig
from train.faults import Faults, detect, no_faults
from train.gradients import make_gradients
from train.mesh import state_shardings
from train.optimizer import make_optimizer
from train.stacked import stack_blocks, stacking_of, unstack_blocks
from train.tasks.examples import Example

Tree = Any  # nested dictionaries of arrays


class TrainState(NamedTuple):
    """State updated by a training step; the data position is saved separately."""

    params: Tree
    optimizer: optax.OptState
    rest: Tree  # non-parameter state: counts of the random streams
    ema: optax.EmaState | None = None  # float32 average of the parameters; None = not computed
    faults: Faults | None = None  # not saved; None = a state that is not trained further


class Metrics(NamedTuple):
    """Metrics of a step, scalars on the device."""

    loss: jax.Array  # nats per predicted token, mean over the batch
    grad_norm: jax.Array  # before clipping
    faults: Faults


Batch = jax.Array | Example  # tokens [b, t + 1] of a text, or examples of a recall task
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def build(
    config: TrainConfig, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState, TrainStep]:
    """Return the graph definition, the initial state, and the jitted training step.

    The state is stacked; see `train.stacked`.

    Args:
        config: configuration of the run.
        mesh: devices over which the state is sharded from the start; None = the default device.
    """
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    graphdef, abstract = abstract_state(config, mesh)
    decay = config.optimizer.ema_decay

    stacking = stacking_of(config.model)

    def create() -> TrainState:
        _, params, rest = split(_create_model(config))
        return _first_state(config, optimizer, stack_blocks(params, stacking), rest)

    if mesh is None:
        return graphdef, create(), make_train_step(graphdef, optimizer, None, decay)
    shardings = jax.tree.map(lambda x: x.sharding, stack_blocks(abstract, stacking))
    # Compiled, parameters may differ in the last bit: one device keeps those of `mesh=None`.
    one = mesh.size == 1
    state = (
        jax.device_put(create(), shardings) if one else jax.jit(create, out_shardings=shardings)()
    )
    return graphdef, state, make_train_step(graphdef, optimizer, shardings, decay)


def abstract_state(
    config: TrainConfig, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, TrainState]:
    """Return the graph definition, and shapes, dtypes and shardings of the state, not stacked.

    Args:
        config: configuration of the run.
        mesh: devices of the state; None = the default device.

    Raises:
        UserError: the mesh does not divide a parameter.
    """
    model = nnx.eval_shape(lambda: _create_model(config))
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    graphdef, params, rest = split(model)
    state = jax.eval_shape(partial(_first_state, config, optimizer), params, rest)
    if mesh is None:
        shardings = jax.tree.map(lambda _: jnp.zeros(()).sharding, state)
    else:
        shardings = state_shardings(model, state, mesh)
    return graphdef, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def _create_model(config: TrainConfig) -> LanguageModel:
    run = config.run
    return LanguageModel(
        config.model,
        rngs=nnx.Rngs(run.seed),
        dtype=jnp.dtype(run.dtype),
        param_dtype=jnp.dtype(run.param_dtype),
    )


def _first_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, params: Tree, rest: Tree
) -> TrainState:
    decay = config.optimizer.ema_decay
    ema = None if decay is None else _make_ema(decay).init(params)
    return TrainState(params, optimizer.init(params), rest, ema, no_faults())


def _make_ema(decay: float) -> optax.GradientTransformation:
    return optax.ema(decay, debias=True, accumulator_dtype=jnp.float32)


def averaged(state: TrainState, config: TrainConfig) -> TrainState:
    """Return the state to evaluate: with the average of the parameters, if the run has one."""
    if state.ema is None:
        return state
    decay = config.optimizer.ema_decay

    def average(ema: optax.EmaState, params: Tree) -> Tree:
        # The average of the parameters after steps 1, ..., n starts from zero.
        weight = 1 - jnp.float32(decay) ** ema.count
        return jax.tree.map(
            lambda mean, p: jnp.where(ema.count > 0, mean / weight, p).astype(p.dtype),
            ema.ema,
            params,
        )

    return TrainState(jax.jit(average)(state.ema, state.params), (), state.rest)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Return graph definition, parameters and other state."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest[0])


def merge(graphdef: nnx.GraphDef, params: Tree, rest: Tree) -> Any:
    """Return the model of a state, stacked or not; the inverse of `split`."""
    return nnx.merge(graphdef, unstack_blocks(params), rest)


def token_losses(graphdef: nnx.GraphDef, params: Tree, rest: Tree, tokens: jax.Array) -> Any:
    """Return the losses [b, t], in nats, of tokens [b, t + 1], and the updated `rest`."""
    model = merge(graphdef, params, rest)
    scores = model.score(tokens[:, :-1], tokens[:, 1:])
    return scores.losses, split(model)[2]


def answer_losses(graphdef: nnx.GraphDef, params: Tree, rest: Tree, batch: Example) -> Any:
    """Return losses [b, p] in nats, correct answers, bool [b, p], and the updated `rest`.

    An answer is correct if its label has the top logit. Answers of weight 0 have the loss 0, even
    if their label is out of range.
    """
    model = merge(graphdef, params, rest)
    read = batch.weights > 0
    scores = model.score(batch.tokens, batch.labels, places=batch.places, read=read)
    return scores.losses, scores.best == batch.labels, split(model)[2]


def sum_losses(graphdef: nnx.GraphDef, params: Tree, rest: Tree, batch: Batch) -> Any:
    """Return the weighted sum of the losses of predicted tokens or answers, and the new `rest`."""
    if isinstance(batch, Example):
        losses, _, rest = answer_losses(graphdef, params, rest, batch)
        # Answers of weight 0 are ignored, even if their loss is NaN.
        return jnp.where(batch.weights > 0, losses * batch.weights, 0).sum(), rest
    losses, rest = token_losses(graphdef, params, rest, batch)
    return losses.sum(), rest


def sum_weights(batch: Batch) -> jax.Array | float:
    """Return the number of predicted tokens, or the sum of the weights of the answers."""
    if isinstance(batch, Example):
        return batch.weights.sum()
    return jnp.asarray(batch.shape[0] * (batch.shape[1] - 1), jnp.float32)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    shardings: TrainState | None = None,
    ema_decay: float | None = None,
) -> TrainStep:
    """Return the jitted training step; it donates its state.

    Batches are stacked microbatches [accumulation, ...]. Gradients are averaged over them. From the
    first step with a non-finite loss, gradient or parameter on, steps change only `faults`.

    Args:
        graphdef: graph definition of the model.
        optimizer: the optimizer.
        shardings: shardings of the state; None = one device.
        ema_decay: decay rate of the average of the parameters; None = no average.
    """
    params_shardings = None if shardings is None else shardings.params
    gradients = make_gradients(partial(sum_losses, graphdef), sum_weights, params_shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradient, rest = gradients(state.params, state.rest, batch)
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else _make_ema(ema_decay).update(params, state.ema)[1]
        norm = optax.tree.norm(gradient)
        assert state.faults is not None
        is_good, faults = detect(state.faults, loss, norm, gradient, params)
        new = TrainState(params, opt_state, rest, ema)
        old = state._replace(faults=None)
        selected = jax.tree.map(partial(jnp.where, is_good), new, old)
        return selected._replace(faults=faults), Metrics(loss, norm, faults)

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    replicated = axes_sharding(jax.tree.leaves(shardings)[0].mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
