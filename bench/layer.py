"""`mc bench layer`: time, tokens per second and bytes of layers, and the machine's roofline."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ceilings import Ceilings, matrix_size, measure
from bench.devices import DEVICES_NOTE, named
from bench.timing import WARM_CACHE_NOTE, Subject, Timing, alternate
from mc_core import MCConfig, ModelConfig
from mc_core.config import LayerConfig
from mc_core.errors import UserError
from mc_core.files import to_png, write_atomic
from mc_core.log_linear import level_count
from mc_core.memories import MEMORIES
from mc_core.tables import ResultTable, Row
from parity.environment import result_table


@dataclass(frozen=True)
class Grid:
    """A grid of layers: each combination of the values is one subject."""

    kinds: Sequence[str] = ("linear",)
    aggregations: Sequence[str] = ("grm",)
    tokens: Sequence[int] = (1024,)
    chunks: Sequence[int] = (64,)
    segments: Sequence[int] = (64,)
    starts: Sequence[str] = ("checkpoint",)  # initial state of segments: checkpoint | restart
    dtypes: Sequence[str] = ("float32",)
    frameworks: Sequence[str] = ("jax",)
    passes: Sequence[str] = ("both",)  # forward | both
    devices: Sequence[int] = (1,)  # numbers of devices over which JAX splits the batch
    mixers: Sequence[str] = ("memory",)  # others ignore kind, aggregation, segment and start
    expansion: int = 4
    batch: int = 2
    width: int = 256
    heads: int = 4
    seed: int = 0


def make_config(
    grid: Grid, kind: str, aggregation: str, chunk: int, segment: int, start: str = "checkpoint"
) -> MCConfig:
    """Return a layer's configuration.

    Raises:
        ValueError: a value is not allowed.
    """
    memory: Any = MEMORIES[kind]()
    if hasattr(memory, "expansion"):
        memory = dataclasses.replace(memory, expansion=grid.expansion)
    return MCConfig(
        grid.width,
        grid.heads,
        memory=memory,
        aggregation=aggregation,
        segment_size=segment,
        state_init_mode=start,
        chunk_size=chunk,
    )


def mixer_config(mixer: str, layer: MCConfig, tokens: int) -> LayerConfig:
    """Return the configuration of a mixer of the width of a memory layer."""
    levels = max(level_count(tokens), ModelConfig.num_levels)
    model = ModelConfig(1, 1, layer, mixers=(mixer,), num_levels=levels)
    return model.block_layers[0]


def run(grid: Grid, runs: int) -> ResultTable:
    """Compile and time a grid in alternating runs, and measure the peak rates of each dtype.

    Args:
        grid: grid of layers.
        runs: number of timed runs per layer; 0: only compile, and report bytes and compile times.
    """
    subjects = build(grid)
    times = alternate({name: s.run for name, s in subjects.items()}, runs) if runs else {}
    ceilings = {dtype: measure(dtype) for dtype in dict.fromkeys(grid.dtypes)} if runs else {}
    notes = []
    if ceilings:
        rates = "; ".join(
            f"{dtype} {of.matmul / 1e9:.0f} GFLOP/s, {of.copy / 1e9:.1f} GB/s"
            for dtype, of in ceilings.items()
        )
        notes.append(
            f"ceilings: a product of {matrix_size():,}² matrices and a large copy: {rates}"
        )
        notes.append(WARM_CACHE_NOTE)
    if max(grid.devices) > 1:
        notes.append(f"{DEVICES_NOTE}; MiB are summed over them")
    rows = [row(s, times.get(name), ceilings.get(s.dtype)) for name, s in subjects.items()]
    size = f"{grid.batch} × tokens, width {grid.width}, {grid.heads} heads"
    return result_table(f"Layers: {size}", rows, notes)


def build(grid: Grid) -> dict[str, Subject]:
    """Compile all combinations; those of PyTorch ignore `devices`."""
    from importlib import import_module

    subjects = {}
    what = (grid.frameworks, grid.mixers, grid.kinds, grid.aggregations, grid.tokens)
    how = (grid.chunks, grid.segments, grid.starts, grid.dtypes, grid.passes, grid.devices)
    combinations: Iterable[tuple[Any, ...]] = itertools.product(*what, *how)
    for values in combinations:
        framework, mixer, kind, aggregation, tokens, chunk, *how_values = values
        segment, start, dtype, passes, devices = how_values
        if framework == "torch" and devices != grid.devices[0]:
            continue
        layer = make_config(grid, kind, aggregation, chunk, segment, start)
        config = mixer_config(mixer, layer, tokens)
        words = [framework, mixer, f"t={tokens}", f"chunk={chunk}"]
        if config == layer:
            words[1] = f"{kind}+{aggregation}"
            words += [f"segment={segment}", *([start] if len(grid.starts) > 1 else [])]
        name = " ".join([*words, dtype, passes])
        options = {} if framework == "torch" else {"devices": devices}
        if options:
            name = named(name, devices)
        if name in subjects:
            continue
        package = import_module(f"bench.{framework}_layers")
        subjects[name] = package.subject(
            config,
            grid.batch,
            tokens,
            dtype=dtype,
            backward=passes == "both",
            seed=grid.seed,
            name=name,
            **options,
        )
    return subjects


def row(subject: Subject, timing: Timing | None, ceilings: Ceilings | None) -> Row:
    """Return the cells of a subject; `floor ms` is the time of its products at the peak rate."""
    cells: Row = {"layer": subject.name}
    if ceilings:
        ceilings = ceilings.of(subject.devices)
    if timing:
        cells["ms"] = 1e3 * timing.median
        cells["spread"] = f"{timing.spread:.0%}"
        cells["processor ms"] = 1e3 * timing.processor_median
        cells["tokens/s"] = subject.tokens / timing.median
    if subject.flops:
        cells["GFLOP"] = subject.flops / 1e9
        if ceilings:
            cells["floor ms"] = 1e3 * subject.flops / ceilings.matmul
        if ceilings and timing:
            cells["of matmul"] = f"{ceilings.share(subject.flops, timing.median):.0%}"
    if subject.bytes:
        cells["MiB"] = subject.bytes / 2**20
        if ceilings and timing:
            # Lower bound: every byte is written and read once.
            cells["of copy"] = f"{2 * subject.bytes / timing.median / ceilings.copy:.0%}"
    cells["compile s"] = subject.compile_s
    cells["compile processor s"] = subject.compile_processor_s
    return cells


def draw(report: ResultTable, path: Path) -> None:
    """Plot the time of each layer, and its lower bound, as a PNG file.

    Raises:
        UserError: the report has no timings.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if "ms" in row]
    if not rows:
        raise UserError("--plot: requires --runs >= 1")
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["layer"] for row in rows]
    axes.barh(names, [row["ms"] for row in rows], color="0.7", label="measured")
    axes.barh(names, [row.get("floor ms", 0) for row in rows], label="floor of its products")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=report.title)
    axes.legend(frameon=False)
    write_atomic(path, to_png(figure, dpi=150))
