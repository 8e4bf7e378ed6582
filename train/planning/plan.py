"""`mc plan`: memory, communication and a bound of the time of a training step on many devices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mc_core.chips import CHIPS, Chip
from mc_core.errors import UserError
from mc_core.footprint import model_parameters
from mc_core.tables import ResultTable, Row
from parity.environment import result_table
from train.config import TextConfig, TrainConfig
from train.planning.costs import BLOCKS, StepCosts

GIB = 2**30


def run(configs: Sequence[TrainConfig], chip: str) -> ResultTable:
    """Plan the training step of a configuration on several meshes.

    Args:
        configs: configurations of runs on text that differ in `run.mesh` only, without -1.
        chip: name in `CHIPS`.

    Raises:
        UserError: the task is another one, or a mesh does not divide the batch or a parameter.
        ValueError: a layer cannot split its tokens over the context axis.
    """
    from mc_jax.sharding import describe
    from train.mesh import open_mesh
    from train.planning.program import step_costs

    columns: dict[str, dict[str, Any]] = {}
    extrapolated = False
    for config in configs:
        if not isinstance(config.data, TextConfig):
            raise UserError(f"data.task = {config.data.task!r}: must be 'text'")
        sizes = config.run.mesh.sizes
        costs = step_costs(config, open_mesh(config.run.mesh))
        extrapolated |= costs.extrapolated
        columns[describe(sizes)] = _column(costs, sizes, CHIPS[chip])
    figures = dict.fromkeys(name for column in columns.values() for name in column)
    names = sorted(figures, key=_section)
    rows: list[Row] = [
        {"per device": name + "*" * (extrapolated and name not in _EXACT)}
        | {mesh: column.get(name) for mesh, column in columns.items()}
        for name in names
    ]
    return result_table(f"Training step on {chip}", rows, _notes(configs[0], chip, extrapolated))


_EXACT = ("devices", "parameters GiB", "optimizer GiB")
_SENT = "sent over "


def _section(name: str) -> int:
    """Return the place of a figure: what is sent comes before the times, also on other meshes."""
    if name.startswith(_SENT):
        return 1
    return 2 if name == "bound" or name.endswith(" ms") else 0


def _notes(config: TrainConfig, chip: str, extrapolated: bool) -> list[str]:
    run, model = config.run, config.model
    tokens = run.accumulation * run.batch_size * config.data.max_tokens
    millions = model_parameters(model) / 1e6
    size = f"{millions:,.0f}M" if millions >= 100 else f"{millions:.3g}M"
    notes = [
        f"{size} parameters, {model.num_layers} blocks of "
        f"{model.name}, {tokens:,} tokens per step in {run.accumulation} × {run.batch_size} "
        f"windows, {run.dtype}",
        "Temporary arrays and accessed bytes are those of XLA's program for CPUs, which holds some "
        "bfloat16 arrays in float32: upper bounds",
        f"{chip}: {CHIPS[chip].description}",
        "ms: each cost at the chip's peak rate; the largest one is the bound",
    ]
    if extrapolated:
        blocks = " and ".join(str(count * len(model.mixers)) for count in BLOCKS)
        notes.append(f"*: extrapolated linearly from compiled models of {blocks} blocks")
    return notes


def _column(costs: StepCosts, sizes: Mapping[str, int], chip: Chip) -> dict[str, Any]:
    """Return the figures of a mesh by name."""
    used = costs.parameters + costs.optimizer + costs.temporary
    times = estimate(costs, sizes, chip)
    figures: dict[str, Any] = {
        "devices": math.prod(sizes.values()),
        "parameters GiB": costs.parameters / GIB,
        "optimizer GiB": costs.optimizer / GIB,
        "temporary GiB": costs.temporary / GIB,
        "fits in memory": used <= chip.memory,
        "TFLOP": costs.flops / 1e12,
        "accessed GB": costs.accessed / 1e9,
    }
    for axes, sent in costs.sent.items():
        figures[f"{_SENT}{' × '.join(axes)}, GB"] = sent / 1e9
    figures |= {f"{name} ms": 1e3 * seconds for name, seconds in times.items()}
    return figures | {"bound": max(times, key=times.__getitem__)}


def estimate(costs: StepCosts, sizes: Mapping[str, int], chip: Chip) -> dict[str, float]:
    """Return the seconds of products, memory accesses and communication at the peak rates.

    Args:
        costs: costs on one device.
        sizes: size of each mesh axis; devices are numbered in their order, the last axis fastest.
        chip: peak rates. Groups that span more chips than a domain use the slower network.
    """
    network = 0.0
    for axes, sent in costs.sent.items():
        names = list(sizes)
        outer = min(names.index(axis) for axis in axes)
        span = math.prod(size for name, size in sizes.items() if names.index(name) >= outer)
        network += sent / (chip.link if span <= chip.domain else chip.network)
    return {
        "products": costs.flops / chip.flops,
        "memory": costs.accessed / chip.bandwidth,
        "network": network,
    }
