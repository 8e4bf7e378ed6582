"""Compiled training steps on simulated devices, without allocating parameters."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mc_jax import LanguageModel
from mc_jax.sharding import axes_sharding, parameter_shardings
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.planning.hlo import Costs, measure, parse, varying_axes
from train.step import TrainState, make_train_step, split

BLOCKS = (2, 3)  # numbers of repetitions of `mixers` from which the costs of a model are derived

Tree = Any  # nested tuples and dictionaries


@dataclass(frozen=True)
class StepCosts:
    """Costs of a training step on one device.

    Attributes:
        parameters: bytes of parameters.
        optimizer: bytes of the optimizer's state.
        temporary: bytes of activations, gradients and other temporary arrays, at the peak.
        flops: FLOPs of matrix products.
        accessed: bytes that the instructions of the program read and write.
        sent: bytes that the device sends, by the mesh axes of the communicating devices.
        extrapolated: the last four are extrapolated from models of fewer blocks.
    """

    parameters: float
    optimizer: float
    temporary: float
    flops: float
    accessed: float
    sent: Mapping[tuple[str, ...], float]
    extrapolated: bool


class _Compiled(NamedTuple):
    temporary: float
    costs: Costs


def step_costs(config: TrainConfig, mesh: Mesh) -> StepCosts:
    """Compile the training step of a text run for a mesh, and count its costs.

    If the model has more than 3 repetitions of its mixers, models of 2 and 3 repetitions are
    compiled, and costs extrapolated linearly in the number of blocks.

    Args:
        config: configuration of a run on text.
        mesh: the devices, which may be simulated.
    """
    _, state = abstract_state(config, mesh)
    period, layers = len(config.model.mixers), config.model.num_layers
    extrapolates = layers > BLOCKS[1] * period
    counts = [period * blocks for blocks in BLOCKS] if extrapolates else [layers]
    compiled = [_compile(_with_blocks(config, count), mesh) for count in counts]
    sent = [_sent_by_axes(c.costs, mesh) for c in compiled]

    def total(values: list[float]) -> float:
        if len(values) == 1:
            return values[0]
        slope = (values[1] - values[0]) / (counts[1] - counts[0])
        return values[0] + slope * (layers - counts[0])

    return StepCosts(
        parameters=_local_bytes(state.params),
        optimizer=_local_bytes(state.optimizer),
        temporary=total([c.temporary for c in compiled]),
        flops=total([c.costs.flops for c in compiled]),
        accessed=total([c.costs.bytes for c in compiled]),
        sent={
            axes: total([s[axes] for s in sent])
            for axes in dict.fromkeys(k for s in sent for k in s)
        },
        extrapolated=extrapolates,
    )


def abstract_state(config: TrainConfig, mesh: Mesh) -> tuple[nnx.GraphDef, TrainState]:
    """Return the graph definition, and shapes, dtypes and shardings of the training state."""
    dtype = jnp.dtype(config.run.dtype)
    model = nnx.eval_shape(
        lambda: LanguageModel(config.model, rngs=nnx.Rngs(config.run.seed), dtype=dtype)
    )
    graphdef, params, rest = split(model)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = nnx.to_pure_dict(nnx.filter_state(parameter_shardings(model, mesh), nnx.Param))
    moments = jax.eval_shape(optimizer.init, params)
    moment_shardings = optax.tree.map_params(
        optimizer, lambda _, s: s, moments, shardings, transform_non_params=lambda _: whole
    )
    state = TrainState(params, moments, rest)
    placed = TrainState(shardings, moment_shardings, jax.tree.map(lambda _: whole, rest))
    return graphdef, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, placed
    )


def _with_blocks(config: TrainConfig, count: int) -> TrainConfig:
    model = dataclasses.replace(config.model, num_layers=count)
    return dataclasses.replace(config, model=model)


def _compile(config: TrainConfig, mesh: Mesh) -> _Compiled:
    graphdef, state = abstract_state(config, mesh)
    step: Any = make_train_step(graphdef, make_optimizer(config.optimizer, config.run.steps))
    run = config.run
    shape = run.accumulation, run.batch_size, config.data.max_tokens + 1
    # One more token than the model reads: the ids are not divided along tokens.
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=axes_sharding(mesh, None, "batch"))
    with jax.set_mesh(mesh):
        compiled = step.lower(state, batch).compile()
    analysis = compiled.memory_analysis()
    return _Compiled(analysis.temp_size_in_bytes, measure(parse(compiled.as_text())))


def _sent_by_axes(costs: Costs, mesh: Mesh) -> Counter[tuple[str, ...]]:
    sent: Counter[tuple[str, ...]] = Counter()
    for collective in costs.collectives:
        axes = varying_axes(collective.groups, dict(mesh.shape))
        sent[axes] += collective.sent * collective.times  # type: ignore[assignment]
    return sent


def _local_bytes(tree: Tree) -> float:
    """Return the bytes of the parts of arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
