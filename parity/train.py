"""`mc parity train`: train the same model in both frameworks, and compare every step.

Both use float64, the same initial weights and the same batches. The Optax optimiser of the training
loop is compared with torch.optim.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from flax import nnx
from rich.table import Table

from mc_core import MCConfig, ModelConfig, TitansConfig
from mc_core.errors import UserError
from mc_core.optimizer import OptimizerConfig, decays
from parity import run_jax, run_torch
from parity.cases import Array, Case
from parity.compare import Difference, difference
from parity.leaves import Leaf
from parity.weights import Flat, jax_weights, load_torch, to_jax, to_torch, torch_weights

TOLERANCE = 1e-8
BATCH = 2
SMALL = ModelConfig(
    29,
    1,
    MCConfig(16, 2, TitansConfig(expansion=1), "grm", segment_size=6, chunk_size=4, conv_width=4),
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=5)
STEPS = 20
MakeOptimizer = Callable[[OptimizerConfig, int], optax.GradientTransformation]


@dataclass(frozen=True)
class StepComparison:
    """One optimiser step in both frameworks."""

    number: int  # from 1
    loss: tuple[float, float]  # of jax and torch, before the step
    norm: tuple[float, float]  # gradient norms of jax and torch, before clipping

    @property
    def differences(self) -> tuple[float, float]:
        """Relative differences of the losses and of the norms."""
        pairs = (self.loss, self.norm)
        loss, norm = (abs(left - right) / abs(left) for left, right in pairs)
        return loss, norm

    @property
    def ok(self) -> bool:
        """True if both are within `TOLERANCE`."""
        return all(x <= TOLERANCE for x in self.differences)


@dataclass(frozen=True)
class Training:
    """Result of both training runs, and the differences of the final parameters."""

    steps: tuple[StepComparison, ...]
    parameters: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """True if losses, norms and parameters agree."""
        return all(step.ok for step in self.steps) and all(x.ok for x in self.parameters)


def train(
    make_optax: MakeOptimizer,
    config: ModelConfig = SMALL,
    optimizer: OptimizerConfig = OPTIMIZER,
    steps: int = STEPS,
    run_steps: int = STEPS,
    tokens: int = 17,
    seed: int = 0,
) -> Training:
    """Train on random batches, and compare.

    Args:
        make_optax: function from a configuration and a number of steps to the Optax optimiser.
        config: configuration of the model.
        optimizer: configuration of the optimiser.
        steps: number of compared steps.
        run_steps: length of the learning-rate schedule; at least `steps` are used.
        tokens: length of the sequences.
        seed: random seed of weights and batches.

    Raises:
        UserError: `optimizer` is not AdamW with float32 moments, which torch.optim has, too.
    """
    if optimizer.name != "adamw" or optimizer.moment_dtype != "float32":
        raise UserError(
            f"optimizer.name = {optimizer.name!r} with moment_dtype = {optimizer.moment_dtype!r}: "
            "must be 'adamw' with 'float32'; only these are compared with PyTorch"
        )
    case = Case(config, "model", tokens=tokens, batch=BATCH, seed=seed)
    weights = run_jax.parameters(case)
    rng = np.random.default_rng(seed)
    # Repeat a few batches, so that the loss decreases.
    batches = rng.integers(config.vocab_size, size=(4, BATCH, tokens + 1))
    batches = batches[np.arange(steps) % len(batches)]
    run_steps = max(run_steps, steps)
    left, ours = _train_jax(case, weights, make_optax(optimizer, run_steps), batches)
    rates = [learning_rate(optimizer, step, run_steps) for step in range(steps)]
    right, theirs = _train_torch(case, weights, optimizer, rates, batches)
    rows = enumerate(zip(left, right, strict=True), 1)
    return Training(
        tuple(StepComparison(number, (a[0], b[0]), (a[1], b[1])) for number, (a, b) in rows),
        tuple(
            difference(name, Leaf(theirs[name], "float64"), Leaf(ours[name], "float64"), TOLERANCE)
            for name in ours
        ),
    )


Rows = list[tuple[float, float]]  # loss and gradient norm of each step


def _train_jax(
    case: Case, weights: Flat, optimizer: optax.GradientTransformation, batches: Array
) -> tuple[Rows, Flat]:
    with jax.enable_x64(True):
        graphdef, shapes = run_jax.abstract(case, "float64")
        params = run_jax.filled(shapes, weights)

        def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
            logits = nnx.merge(graphdef, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def step(params: Any, state: Any, tokens: jax.Array) -> Any:
            loss, gradient = jax.value_and_grad(loss_of)(params, tokens)
            updates, state = optimizer.update(gradient, state, params)
            norm = optax.tree.norm(gradient)
            return optax.apply_updates(params, updates), state, loss, norm

        state, rows = _wide_counters(optimizer.init(params)), []
        for tokens in batches:
            params, state, loss, norm = step(params, state, jnp.asarray(tokens, jnp.int32))
            assert loss.dtype == norm.dtype == jnp.float64
            rows.append((float(loss), float(norm)))
        return rows, jax_weights(nnx.merge(graphdef, params))


def _wide_counters(state: Any) -> Any:
    """Convert step counters to int64; with int32, optax computes learning rates in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.int64) if x.dtype == jnp.int32 else x, state)


def _train_torch(
    case: Case, weights: Flat, config: OptimizerConfig, rates: list[float], batches: Array
) -> tuple[Rows, Flat]:
    model = run_torch.build(case, "float64", "cpu")
    load_torch(model, to_torch(weights))
    params = dict(model.named_parameters())
    decayed = {name for name in params if _decays(name, params[name])}
    groups = [
        {"params": [params[n] for n in params if (n in decayed) is yes], "weight_decay": decay}
        for yes, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=1.0, betas=(config.beta1, config.beta2), eps=config.eps
    )
    rows = []
    for rate, ids in zip(rates, torch.tensor(batches), strict=True):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        gradients = [param.grad for param in params.values()]
        norm = torch.nn.utils.get_total_norm(gradients)
        # `clip_grad_norm_` divides by the norm plus 1e-6, optax by the norm.
        if config.clip_norm is not None and norm > config.clip_norm:
            torch._foreach_mul_(gradients, config.clip_norm / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows, to_jax(torch_weights(model))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, from 0: linear warmup, then the schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        first = peak / (warmup + 1)
        return first + (peak - first) * step / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        share = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
    else:
        decay = min(round(config.decay_fraction * steps), steps - warmup)
        share = min(1.0, (steps - step) / decay) if decay else 1.0
    return peak * (config.final_fraction + (1 - config.final_fraction) * share)


def _decays(name: str, param: torch.Tensor) -> bool:
    ((jax_name, value),) = to_jax({name: param.detach().numpy()}).items()
    return decays(jax_name, value.ndim)


def table(steps: tuple[StepComparison, ...]) -> Table:
    """Return the table of all steps."""
    made = Table(
        "step",
        "loss, jax",
        "loss, torch",
        "difference",
        "gradient norm, jax",
        "torch",
        "difference",
    )
    for column in made.columns:
        column.justify = "right"
    for step in steps:
        apart = step.differences
        made.add_row(
            str(step.number),
            *(f"{x:.12f}" for x in step.loss),
            f"{apart[0]:.0e}",
            *(f"{x:.12f}" for x in step.norm),
            f"{apart[1]:.0e}",
            style=None if step.ok else "red",
        )
    return made


def summary(training: Training) -> str:
    """Return a one-line summary."""
    worst = max(training.parameters, key=lambda leaf: leaf.severity)
    apart = max(max(step.differences) for step in training.steps)
    return (
        f"{'equal' if training.ok else 'NOT EQUAL'} to {TOLERANCE:.0e} over {len(training.steps)} "
        f"steps: losses and gradient norms within {apart:.0e}; of {len(training.parameters)} "
        f"final parameters the worst is {worst.describe()}"
    )


def draw(training: Training, path: Path) -> bytes:
    """Return a plot of the training runs, in the image format of the suffix of the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    losses, errors = figure.subplots(1, 2)
    numbers = [step.number for step in training.steps]
    for side, name, line in ((0, "JAX", "-"), (1, "PyTorch", "--")):
        losses.plot(numbers, [step.loss[side] for step in training.steps], line, label=name)
    losses.set(title="loss (nats per token)", xlabel="step")
    for kind, name in enumerate(("loss", "gradient norm")):
        values = [max(step.differences[kind], 1e-17) for step in training.steps]
        errors.semilogy(numbers, values, label=name)
    errors.axhline(TOLERANCE, color="gray", linestyle=":", label="allowed")
    errors.set(title="relative difference", xlabel="step")
    for axes in (losses, errors):
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png")
    return buffer.getvalue()
