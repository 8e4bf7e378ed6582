"""`mc plan`: memory, communication and a bound of the time of a training step on many devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mc_core.chips import CHIPS, Chip
from mc_core.errors import UserError
from mc_core.footprint import model_parameters
from mc_core.tables import ResultTable, Row
from parity.environment import result_table
from train.config import TextConfig, TrainConfig
from train.planning.program import StepCosts

GIB = 2**30


def parse_mesh(text: str) -> dict[str, int]:
    """Return the size of each mesh axis from `data=8,fsdp=8`; axes that are not named have size 1.

    Raises:
        UserError: the text has another form, an unknown axis, or a size below 1.
    """
    from mc_jax.sharding import AXES

    sizes = dict.fromkeys(AXES, 1)
    for word in text.split(","):
        axis, _, size = word.strip().partition("=")
        if axis not in sizes:
            raise UserError(f"--mesh {text}: {axis!r}: must be one of {', '.join(AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh {text}: {axis} = {size}: must be an integer >= 1")
        sizes[axis] = int(size)
    return sizes


def check(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Check that a mesh divides the batch of a run on text.

    Raises:
        UserError: it does not, or the task is another one.
    """
    if not isinstance(config.data, TextConfig):
        raise UserError(f"data.task = {config.data.task!r}: must be 'text'")
    rows = sizes["data"] * sizes["fsdp"]
    if config.run.batch_size % rows:
        raise UserError(
            f"run.batch_size = {config.run.batch_size}: must be a multiple of data * fsdp = {rows}"
        )


def run(config: TrainConfig, meshes: Sequence[Mapping[str, int]], chip: str) -> ResultTable:
    """Plan the training step on each mesh.

    Args:
        config: configuration of a run on text.
        meshes: size of each mesh axis.
        chip: name in `CHIPS`.

    Raises:
        UserError: a mesh does not divide the batch, or a parameter.
        ValueError: a layer cannot split its tokens over the context axis.
    """
    import jax

    from mc_jax.sharding import AXES, describe, make_mesh
    from train.planning.program import step_costs

    rows: list[Row] = []
    extrapolated = False
    for sizes in meshes:
        check(config, sizes)
        count = math.prod(sizes.values())
        costs = step_costs(
            config, make_mesh(*(sizes[axis] for axis in AXES), devices=jax.devices()[:count])
        )
        extrapolated |= costs.extrapolated
        rows.append({"devices": count, "mesh": describe(sizes)} | _row(costs, sizes, CHIPS[chip]))
    run, model = config.run, config.model
    tokens = run.accumulation * run.batch_size * config.data.max_tokens
    notes = [
        f"{model_parameters(model) / 1e6:,.0f}M parameters, {model.num_layers} blocks of "
        f"{model.name}, {tokens:,} tokens per step in {run.accumulation} × {run.batch_size} "
        f"windows, {run.dtype}",
        "All figures are of one device. Temporary arrays and accessed bytes are those of XLA's "
        "program for CPUs, which holds some bfloat16 arrays in float32: upper bounds",
        f"{chip}: {CHIPS[chip].description}",
        "ms: each cost at the chip's peak rate. The step takes at least the largest of those of "
        "products and network, if they overlap; accessed bytes are an upper bound",
    ]
    if extrapolated:
        notes.append(
            "Columns with *: compiled with 2 and 3 blocks, and extrapolated linearly to "
            f"{model.num_layers}"
        )
        rows = [{_starred(name): value for name, value in row.items()} for row in rows]
    return result_table(f"Training step on {chip}", rows, notes)


_EXACT = ("devices", "mesh", "parameters GiB", "optimizer GiB")


def _starred(name: str) -> str:
    return name if name in _EXACT else f"{name}*"


def _row(costs: StepCosts, sizes: Mapping[str, int], chip: Chip) -> Row:
    used = costs.parameters + costs.optimizer + costs.temporary
    times = estimate(costs, sizes, chip)
    row: Row = {
        "parameters GiB": costs.parameters / GIB,
        "optimizer GiB": costs.optimizer / GIB,
        "temporary GiB": costs.temporary / GIB,
        "fits": used <= chip.memory,
        "TFLOP": costs.flops / 1e12,
        "accessed GB": costs.accessed / 1e9,
    }
    for axes, sent in costs.sent.items():
        row[f"sent over {' × '.join(axes)} GB"] = sent / 1e9
    row |= {f"{name} ms": 1e3 * seconds for name, seconds in times.items()}
    return row | {"bound": max(times, key=times.__getitem__)}


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


def chip_table() -> list[dict[str, Any]]:
    """Return the figures of all chips, one row each."""
    return [{"chip": name, **dataclasses.asdict(chip)} for name, chip in CHIPS.items()]
