"""Compiled training steps on simulated devices, without allocating parameters."""

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mc_jax.sharding import axes_sharding
from train.config import TrainConfig
from train.optimizer import make_optimizer
from train.planning.costs import BLOCKS, StepCosts
from train.planning.hlo import Costs, measure, parse, varying_axes
from train.stacked import stack_blocks, stacking_of
from train.step import abstract_state, make_train_step

Tree = Any  # nested tuples and dictionaries


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
        optimizer=_local_bytes((state.optimizer, state.ema)),
        temporary=total([c.temporary for c in compiled]),
        flops=total([c.costs.flops for c in compiled]),
        accessed=total([c.costs.bytes for c in compiled]),
        sent={
            axes: total([s[axes] for s in sent])
            for axes in dict.fromkeys(k for s in sent for k in s)
        },
        extrapolated=extrapolates,
    )


def _with_blocks(config: TrainConfig, count: int) -> TrainConfig:
    scans = config.model.scans_layers  # else fewer blocks may not be scanned
    model = dataclasses.replace(config.model, num_layers=count, scan_layers=scans)
    return dataclasses.replace(config, model=model)


def _compile(config: TrainConfig, mesh: Mesh) -> _Compiled:
    graphdef, state = abstract_state(config, mesh)
    state = stack_blocks(state, stacking_of(config.model))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    step: Any = make_train_step(graphdef, optimizer, shardings, config.optimizer.ema_decay)
    run = config.run
    shape = run.accumulation, run.batch_size, config.data.max_tokens + 1
    # Ids are not split along tokens: there is one more of them than the model reads.
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
