"""Losses, and one optimiser step as a pure function of the training state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mc_core.errors import NotFiniteError
from mc_jax import LanguageModel
from mc_jax.ids import safe_ids
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.tasks.examples import Example

Tree = Any  # nested dictionaries of arrays


class TrainState(NamedTuple):
    """State updated by a training step; the data position is saved separately."""

    params: Tree  # float32
    optimizer: optax.OptState
    rest: Tree  # non-parameter state: counts of the random streams


class Metrics(NamedTuple):
    """Metrics of a step: float32 scalars and booleans."""

    loss: jax.Array  # nats per predicted token, mean over the batch
    grad_norm: jax.Array  # before clipping
    all_finite: jax.Array
    finite: dict[str, Tree]  # "gradient" and "parameter": True where a tensor is finite


Batch = jax.Array | Example  # tokens [b, t + 1] of a text, or examples of a recall task
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def build(config: TrainConfig) -> tuple[nnx.GraphDef, TrainState, TrainStep]:
    """Return the graph definition, the initial state, and the jitted training step."""
    model = LanguageModel(
        config.model, rngs=nnx.Rngs(config.run.seed), dtype=jnp.dtype(config.run.dtype)
    )
    graphdef, params, rest = split(model)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    state = TrainState(params, optimizer.init(params), rest)
    return graphdef, state, make_train_step(graphdef, optimizer)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Return graph definition, parameters and other state; `nnx.merge` is the inverse."""
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest[0])


def token_losses(graphdef: nnx.GraphDef, params: Tree, rest: Tree, tokens: jax.Array) -> Any:
    """Return the losses [b, t], in nats, of tokens [b, t + 1], and the updated `rest`."""
    model = nnx.merge(graphdef, params, rest)
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return cross_entropy(logits, tokens[:, 1:]), split(model)[2]


def cross_entropy(
    logits: jax.Array, labels: jax.Array | np.ndarray, read: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """Return the losses [b, t], in nats, of labels [b, t] under logits [b, t, s].

    Out-of-range labels give NaN if `read`, bool [b, t], is True, and the loss of label 0 otherwise.
    """
    labels, wrong = safe_ids(labels, logits.shape[-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.where(wrong if read is None else wrong & read, jnp.nan, losses)


def answer_losses(graphdef: nnx.GraphDef, params: Tree, rest: Tree, batch: Example) -> Any:
    """Return losses [b, p] in nats, correct answers, bool [b, p], and the updated `rest`.

    Logits are computed only at the answers. An answer is correct if its label has the top logit.
    """
    model = nnx.merge(graphdef, params, rest)
    logits = model(batch.tokens, None, batch.places).astype(jnp.float32)
    losses = cross_entropy(logits, batch.labels, batch.weights > 0)
    return losses, logits.argmax(-1) == batch.labels, split(model)[2]


def mean_loss(graphdef: nnx.GraphDef, params: Tree, rest: Tree, batch: Batch) -> Any:
    """Return the mean loss over predicted tokens or answers, and the updated `rest`."""
    if isinstance(batch, Example):
        losses, _, rest = answer_losses(graphdef, params, rest, batch)
        # Answers of weight 0 are ignored, even if their loss is NaN.
        total = jnp.where(batch.weights > 0, losses * batch.weights, 0).sum()
        return total / batch.weights.sum(), rest
    losses, rest = token_losses(graphdef, params, rest, batch)
    return losses.mean(), rest


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> TrainStep:
    """Return the jitted training step; it donates its state.

    Batches are stacked microbatches [accumulation, ...]. Gradients are averaged over them.
    """

    def loss_of(params: Tree, rest: Tree, batch: Batch) -> Any:
        return mean_loss(graphdef, params, rest, batch)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def add(carry: Any, microbatch: Any) -> Any:
            total, gradient, rest = carry
            grad_of = jax.value_and_grad(loss_of, has_aux=True)
            (loss, rest), new = grad_of(state.params, rest, microbatch)
            return (total + loss, jax.tree.map(jnp.add, gradient, new), rest), None

        first = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params), state.rest)
        (loss, gradient, rest), _ = jax.lax.scan(add, first, batch)
        count = len(jax.tree.leaves(batch)[0])
        loss, gradient = jax.tree.map(lambda x: x / count, (loss, gradient))
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jax.tree.map(
            lambda x: jnp.isfinite(x).all(), {"gradient": gradient, "parameter": params}
        )
        flags = jnp.stack([jnp.isfinite(loss), *jax.tree.leaves(finite)])
        metrics = Metrics(loss, optax.tree.norm(gradient), flags.all(), finite)
        return TrainState(params, opt_state, rest), metrics

    return jax.jit(step, donate_argnums=0)


def check_finite(metrics: Metrics, step: int, last_good: int) -> None:
    """Raise an error if the loss, a gradient or a parameter is not finite.

    Raises:
        NotFiniteError: the message has the step, the loss and the first non-finite tensor.
    """
    if metrics.all_finite:
        return
    leaves = jax.tree_util.tree_leaves_with_path(metrics.finite)
    first = next((path for path, finite in leaves if not finite), None)
    tensor = _name(first) if first else "the loss"
    raise NotFiniteError(
        f"step {step}: {tensor} is not finite (loss {float(metrics.loss):.4g}, "
        f"gradient norm {float(metrics.grad_norm):.4g}); "
        f"the last good checkpoint is step {last_good}"
    )


def _name(path: tuple[Any, ...]) -> str:
    """Return `gradient of blocks/0/...` for a leaf of `Metrics.finite`."""
    kind, _, tensor = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
    return f"{kind} of {tensor}"
