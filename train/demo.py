"""`mc demo`: a recall task that a model answers with a cache and fails without one."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from mc_core import MCConfig, make_plan
from mc_core.config import ModelConfig
from mc_core.errors import UserError
from mc_core.files import write_atomic
from parity.environment import cores
from train.checkpoint import load_run
from train.config import NIAHConfig
from train.evaluation.demo_picture import Router, Score, draw_demo
from train.evaluation.evaluate import stream_bytes
from train.sweeps.results import RunResult
from train.sweeps.sweep import run_all
from train.sweeps.sweep_config import load_sweep, make_runs
from train.tasks.examples import Example
from train.tasks.niah import Needles

DEPTH = 0.25  # of the needle in the example of the picture, as a share of the haystack


class Demo(NamedTuple):
    """Result of the demo."""

    scores: list[Score]  # without a cache, with one, and attention, which is not trained
    router: Router  # gates of the cached model on one example


def demo(config: Path, picture: Path | None, console: Console) -> Demo:
    """Train a model with and without a cache to find needles, and draw what they recall.

    Args:
        config: sweep with two rows on needles: without a cache, and with gates.
        picture: output file, PNG; None = `demo.png` in the sweep's directory.
        console: receives progress and the table.

    Raises:
        UserError: the configuration is invalid.
        OSError: a file cannot be read or written.
    """
    plan = load_sweep(config)
    runs = make_runs(plan)
    models = [own[0].config.model.layer for own in runs.values()]
    if [layer.rule.reads_cache for layer in models] != [False, True]:
        raise UserError(f"{config}: must have two rows, without and with a cache")
    data = next(iter(runs.values()))[0].config.data
    if not isinstance(data, NIAHConfig):
        raise UserError(f"{config}: data.task = {data.task!r}: must be 'niah'")
    console.print(
        "Needles in haystacks: one of many sentences has a number of 7 digits, and the last line "
        "asks for it. The same model is trained twice, without and with cached memories.",
        highlight=False,
    )
    results = run_all(plan, runs, console, jobs=min(2, len(cores())))
    configs = {row: own[0].config for row, own in runs.items()}
    scores = [score_of(result, configs[result["row"]].model) for result in results]
    cached = next(
        run for own in runs.values() for run in own if run.config.model.layer.rule.reads_cache
    )
    tokens = results[0]["state_tokens"]
    attention = dataclasses.replace(cached.config.model, mixers=("attention",))
    scores.append(Score("attention's KV cache", (), stream_bytes(attention, tokens) or 0, tokens))
    found = Demo(scores, route(Path(cached.config.run.directory)))
    print_demo(console, found)
    picture = picture or Path(plan.directory) / "demo.png"
    write_atomic(picture, draw_demo(found.scores, found.router))
    console.print(f"picture: {picture}", soft_wrap=True, highlight=False)
    return found


def score_of(result: RunResult, model: ModelConfig) -> Score:
    """Return the share of needles found, by haystack length, and the bytes of the state."""
    cached = model.layer.rule.reads_cache
    name = f"{model.layer.memory.kind}, {'with a cache' if cached else 'without a cache'}"
    cells = tuple((cell["tokens"], cell["right"] / cell["asked"]) for cell in result["test"])
    return Score(name, cells, result["state_bytes"], result["state_tokens"])


def route(directory: Path) -> Router:
    """Return the gates of a run's model on a test example.

    They are those of the head that gives the segments with the needle's value the largest weight
    at the answer.
    """
    config, model, *_ = load_run(directory)
    data = config.data
    assert isinstance(data, NIAHConfig)
    depth = int(DEPTH * data.depths)
    length = data.lengths[0]
    example = Needles(data, config.model.vocab_size, 0).draw(length, depth)("test", 0)
    _, traces = jax.jit(lambda tokens: model.inspect(tokens))(example.tokens[None])
    layer = config.model.layer
    assert isinstance(layer, MCConfig)
    plan = make_plan(length, layer)
    asked = example.places[example.weights > 0]
    place = find_value(example)
    segments = np.unique(plan.segment_of[place : place + len(asked)])
    gates = np.stack([trace.gates[0] for trace in traces])  # [layers, t, h, n + 1]
    weight = gates[:, asked][..., segments].sum(-1).mean(1)  # [layers, h]
    block, head = (int(i) for i in np.unravel_index(np.argmax(weight), weight.shape))
    best = float(weight[block, head])
    return Router(
        gates[block, :, head], plan, tuple(segments.tolist()), int(asked[0]), best, block, head
    )


def find_value(example: Example) -> int:
    """Return the position of the needle's value, or of the needle if its tokens differ."""
    value = example.labels[example.weights > 0]
    windows = np.lib.stride_tricks.sliding_window_view(example.tokens, len(value))
    found = np.flatnonzero((windows == value).all(-1))
    return int(found[0]) if len(found) else int(example.origins[0])


def print_demo(console: Console, found: Demo) -> None:
    """Print accuracy and bytes, and the weight of the gates on the needle."""
    table = Table("needles found", title="recall", box=None)
    lengths = [tokens for tokens, _ in found.scores[0].cells]
    for name in (*(f"{tokens} bytes" for tokens in lengths), "state"):
        table.add_column(name, justify="right")
    for score in found.scores:
        cells = [f"{100 * share:.1f}%" for _, share in score.cells] or [""] * len(lengths)
        table.add_row(score.name, *cells, f"{score.state_bytes / 1000:,.0f} kB")
    console.print(table)
    router = found.router
    count = router.gates.shape[-1]
    console.print(
        f"At the answer, head {router.head} of layer {router.block} gives {router.weight:.0%} of "
        f"its weight to the {len(router.needle)} of {count} memories that contain the needle's "
        f"number; equal gates would give {len(router.needle) / count:.0%}.",
        highlight=False,
        soft_wrap=True,
    )
