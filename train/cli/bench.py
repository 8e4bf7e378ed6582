"""`mc bench`. Commands import lazily, to start quickly."""

from enum import StrEnum
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mc_core.aggregations import AGGREGATIONS
from mc_core.config import MIXERS, START_MODES
from mc_core.errors import UserError
from train.cli.options import Aggregation, Kind, Segmentation, config_argument, output_file

if TYPE_CHECKING:
    from mc_core.tables import ResultTable

app = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)

Start = StrEnum("Start", list(START_MODES))  # type: ignore[misc]
Mixer = StrEnum("Mixer", list(MIXERS))  # type: ignore[misc]
Dtype = StrEnum("Dtype", ["float32", "bfloat16"])
Framework = StrEnum("Framework", ["jax", "torch"])
Passes = StrEnum("Passes", ["forward", "both"])

Runs = Annotated[int, typer.Option(min=0, help="number of timed runs; 0 only compiles")]
Json = Annotated[Path | None, output_file("output file of all numbers, as JSON")]
Markdown = Annotated[Path | None, output_file("output file of the table, as Markdown")]
Positive = Annotated[int, typer.Option(min=1)]
Seed = Annotated[int, typer.Option(min=0, help="random seed of parameters and batch")]
MIXER = "token mixer; only `memory` has a kind, an aggregation, segments and a start"
DEVICES = "number of devices over which JAX splits the batch"

WIDTH = 200  # of tables, if stdout is not a terminal


@app.command()
def layer(
    kind: Annotated[list[Kind], typer.Option()] = [Kind("linear")],  # noqa: B006
    aggregation: Annotated[list[Aggregation], typer.Option()] = [Aggregation("grm")],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(min=1)] = [1024],  # noqa: B006
    chunk: Annotated[list[int], typer.Option(min=1)] = [64],  # noqa: B006
    segment: Annotated[list[int], typer.Option(min=1)] = [64],  # noqa: B006
    start: Annotated[list[Start], typer.Option()] = [Start("checkpoint")],  # noqa: B006
    dtype: Annotated[list[Dtype], typer.Option()] = [Dtype.float32],  # noqa: B006
    framework: Annotated[list[Framework], typer.Option()] = [Framework.jax],  # noqa: B006
    passes: Annotated[list[Passes], typer.Option()] = [Passes.both],  # noqa: B006
    devices: Annotated[list[int], typer.Option(min=1, help=DEVICES)] = [1],  # noqa: B006
    mixer: Annotated[list[Mixer], typer.Option(help=MIXER)] = [Mixer("memory")],  # noqa: B006
    expansion: Annotated[
        int, typer.Option(min=1, help="hidden width of an MLP memory, in head widths")
    ] = 4,
    batch: Positive = 2,
    width: Positive = 256,
    heads: Positive = 4,
    seed: Seed = 0,
    runs: Runs = 10,
    json: Json = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, output_file("output file of a bar plot")] = None,
) -> None:
    """Time layers, for every combination of the repeated options."""
    from bench import layer as run
    from mc_jax.sharding import request

    request(max(devices))
    grid = _grid(locals())
    report = _plain(run.run, grid, runs)
    _show(report, json, markdown)
    if plot:
        run.draw(report, plot)


@app.command()
def scaling(
    kind: Kind = Kind("linear"),
    aggregation: Annotated[list[Aggregation], typer.Option()] = [  # noqa: B006
        Aggregation(name) for name in ("none", "grm", "ssc")
    ],
    tokens: Annotated[list[int], typer.Option(min=1)] = [  # noqa: B006
        1024 << power for power in range(7)
    ],
    chunk: Positive = 64,
    segment: Positive = 64,
    dtype: Dtype = Dtype.float32,
    passes: Passes = Passes.both,
    expansion: Positive = 4,
    batch: Positive = 1,
    width: Positive = 256,
    heads: Positive = 4,
    seed: Seed = 0,
    runs: Runs = 10,
    json: Json = None,
    markdown: Markdown = None,
    plot: Annotated[Path | None, output_file("output file of the plot")] = None,
) -> None:
    """Time a layer against the number of tokens, and fit the exponents."""
    from bench import scaling as run

    if not runs:
        raise UserError("--runs 0: must be >= 1")
    report = _plain(run.run, _grid(locals()), runs)
    _show(report, json, markdown)
    if plot:
        run.draw(report, plot)


@app.command()
def model(
    config: Annotated[Path, config_argument("YAML file of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    mesh: Annotated[
        str | None, typer.Option(help="data=4,heads=2: as run.mesh", show_default="the file's")
    ] = None,
    runs: Annotated[int, typer.Option(min=1)] = 10,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Time the training step of a configuration, on random tokens."""
    from bench import model as run
    from mc_jax.sharding import request
    from train.config import TextConfig, load_config, parse_mesh

    words = (
        [f"run.mesh.{axis}={size}" for axis, size in parse_mesh(mesh).sizes.items()] if mesh else []
    )
    loaded = load_config(config, [*(overrides or ()), *words])
    request(loaded.run.mesh.cpu_devices)
    if not isinstance(loaded.data, TextConfig):
        raise UserError(f"{config}: data.task = {loaded.data.task!r}: must be 'text'")
    from train.mesh import check_batch, open_mesh
    from train.step import build, token_losses

    opened = open_mesh(loaded.run.mesh)
    check_batch(loaded, opened)
    _show(run.run(loaded, opened, build, token_losses, runs), json, markdown)


@app.command()
def peers(
    only: Annotated[
        list[str] | None,
        typer.Option(help="name of a comparison; may be repeated", show_default="all"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="number of torch threads", show_default="torch's default"),
    ] = None,
    devices: Annotated[
        list[int] | None,
        typer.Option(min=1, help=DEVICES, show_default="1, and 2 where a CPU has two cores"),
    ] = None,
    runs: Annotated[int, typer.Option(min=1)] = 10,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Compare this package with alternatives."""
    _need_torch()
    from bench import peers as run
    from mc_jax.sharding import request
    from parity.environment import cores

    request(max(devices or [min(2, len(cores()))]))
    _show(run.run(only or (), runs, threads, devices or ()), json, markdown)


@app.command()
def memory(
    config: Annotated[Path, config_argument("YAML file of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    tokens: Annotated[list[int], typer.Option(min=1)] = [  # noqa: B006
        1024 << 2 * power for power in range(5)
    ],
    cache_dtype: Annotated[
        Dtype, typer.Option(help="dtype of cached memories, keys and values")
    ] = Dtype.float32,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Compare the bytes of a model's cache with a KV cache, computed from the configuration."""
    from bench import memory as run
    from train.config import load_config

    model = load_config(config, overrides or ()).model
    _show(_plain(run.run, model, tokens, str(cache_dtype)), json, markdown)


@app.command()
def decode(
    kind: Annotated[list[Kind], typer.Option()] = [Kind("linear"), Kind("titans")],  # noqa: B006
    aggregation: Annotated[list[Aggregation], typer.Option()] = [  # noqa: B006
        Aggregation(name) for name in AGGREGATIONS if name != "mean"
    ],
    context: Annotated[list[int], typer.Option(min=1, help="number of tokens in the context")] = [  # noqa: B006
        1024,
        8192,
        65536,
    ],
    prompt: Annotated[int, typer.Option(min=0, help="tokens of a prompt; 0: no prompt")] = 2048,
    chunk: Positive = 64,
    segment: Positive = 256,
    segmentation: Annotated[
        list[Segmentation], typer.Option(help="may be repeated; logarithmic cannot stream")
    ] = [Segmentation("constant")],  # noqa: B006
    width: Positive = 256,
    heads: Positive = 4,
    seed: Seed = 0,
    runs: Annotated[int, typer.Option(min=1, max=60, help="number of timed tokens per layer")] = 20,
    devices: Annotated[
        int, typer.Option(min=1, help="also time a prompt with its heads split over N devices")
    ] = 1,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Time the decoding of one token after long contexts, compared with attention."""
    from bench import decode as run
    from mc_jax.sharding import request

    request(devices)
    kinds, aggregations = map(str, kind), [str(name) for name in aggregation]
    sizes = {"width": width, "heads": heads, "segment_size": segment, "chunk_size": chunk}
    configs = [
        _plain(partial(run.layer, one, other, segmentation=str(rule), **sizes))
        for one, other, rule in product(kinds, aggregations, segmentation)
    ]
    _show(run.run(configs, context, prompt, runs, seed, devices), json, markdown)


def _grid(options: dict[str, Any]) -> Any:
    from bench.layer import Grid

    plural = {
        "kind": "kinds",
        "aggregation": "aggregations",
        "chunk": "chunks",
        "segment": "segments",
        "start": "starts",
        "dtype": "dtypes",
        "framework": "frameworks",
        "tokens": "tokens",
        "passes": "passes",
        "devices": "devices",
        "mixer": "mixers",
    }
    values: dict[str, Any] = {
        many: tuple(options[one]) if isinstance(options[one], list) else (options[one],)
        for one, many in plural.items()
        if one in options
    }
    values = {name: tuple(map(_value, several)) for name, several in values.items()}
    if "torch" in values.get("frameworks", ()):
        _need_torch()
    same = ("expansion", "batch", "width", "heads", "seed")
    plain: dict[str, Any] = values | {name: options[name] for name in same}
    return Grid(**plain)


def _value(option: Any) -> Any:
    return str(option) if isinstance(option, StrEnum) else option


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UserError("torch is not installed: pip install 'memory-caching-jax[torch]'")


def _plain(function: Any, *args: Any) -> Any:
    """Call a function, converting ValueError to UserError."""
    try:
        return function(*args)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _show(report: "ResultTable", json: Path | None, markdown: Path | None) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    console.print(report.table())
    for line in report.footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    report.save(json, markdown)
