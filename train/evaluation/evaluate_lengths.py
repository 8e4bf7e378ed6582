"""`mc evaluate RUN --lengths`: bits per byte of a text by the length of the window."""

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mc_core.errors import UserError
from mc_core.files import to_bytes, to_json, write_atomic
from parity.environment import command, machine
from train.checkpoint import Meta, load_run
from train.config import TextConfig
from train.evaluation.bootstrap import SAMPLES, Interval, Resampling
from train.evaluation.evaluate_text import LoadedRun, ScoredText, read_scored_text
from train.evaluation.lengths_report import draw_lengths, tables
from train.evaluation.options import EvaluationOptions
from train.evaluation.validation import make_token_scorer, position_edges
from train.step import split


@dataclass(frozen=True)
class LengthReport:
    """Bits of a text under one or several models by the length of the window, as plain values.

    Every model scores the same tokens at every length. Intervals are bootstrap intervals over
    windows of the greatest length, so that those of differences are paired.

    Attributes:
        run: run directory.
        step: step of its last checkpoint.
        text: `validation`, or the files and folders that were scored.
        bytes: length of the text in bytes.
        tokens: number of predicted tokens; all tokens of the text but the first.
        sha256: hash of the tokens.
        unit: "byte", or "token" if the run has a tokenizer.
        trained: tokens per window in training.
        lengths: tokens per window, ascending.
        windows: number of windows of the greatest length.
        seed: random seed of the bootstrap.
        samples: number of bootstrap samples.
        models: name, overrides, description, number of parameters and `lengths` of each model; see
            `score_lengths`.
    """

    run: str
    step: int
    text: str | list[str]
    bytes: int
    tokens: int
    sha256: str
    unit: str
    trained: int
    lengths: list[int]
    windows: int
    seed: int
    models: list[dict[str, Any]]
    samples: int = SAMPLES
    command: str = field(default_factory=command)
    machine: dict[str, Any] = field(default_factory=machine)


def evaluate_lengths(
    run: LoadedRun,
    meta: Meta,
    options: EvaluationOptions,
    console: Console,
    *,
    json_file: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
) -> LengthReport:
    """Score a text in windows of several lengths, and print and write the results.

    Args:
        run: loaded run.
        meta: metadata of its checkpoint.
        options: lengths, text, seed, and overrides of further models.
        console: receives the tables.
        json_file: output file of the numbers.
        markdown: output file of the tables.
        plot: output file of the plot.

    Raises:
        UserError: the text is missing, or an option is not supported.
        OSError: a file cannot be read or written.
    """
    if not isinstance(run.config.data, TextConfig):
        raise UserError(
            f"{run.directory}: --lengths: a run on data.task = {run.config.data.task!r} has no "
            "text: use a run on data.task = text"
        )
    lengths = parse_lengths(options.lengths or "")
    models = [run, *(_variant(run, words) for words in options.compare)]
    text = read_scored_text(run, meta, options.corpus)
    report = LengthReport(
        run=str(run.directory),
        step=run.step,
        text=text.name,
        bytes=text.size,
        tokens=len(text.tokens) - 1,
        sha256=hashlib.sha256(text.tokens.astype("<i4").tobytes()).hexdigest(),
        unit="byte" if run.config.tokenizer == "bytes" else "token",
        trained=meta.config["data"].get("window", run.config.data.max_tokens),
        lengths=lengths,
        windows=-(-(len(text.tokens) - 1) // lengths[-1]),
        seed=options.seed,
        models=score_models(models, text, lengths, options.seed),
    )
    reports = tables(report)
    for one in reports:
        console.print(one.table())
    for line in reports[0].footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_file:
        write_atomic(json_file, to_json(dataclasses.asdict(report), indent=1).encode())
    if markdown:
        write_atomic(markdown, to_bytes("\n".join(one.as_markdown() for one in reports)))
    if plot:
        write_atomic(plot, draw_lengths(report))
    return report


def parse_lengths(words: str) -> list[int]:
    """Return the lengths in `512,1024,...`, ascending.

    Raises:
        UserError: a length is not a positive integer, or occurs twice.
    """
    try:
        lengths = sorted(int(word) for word in words.split(","))
    except ValueError as error:
        raise UserError(f"--lengths {words!r}: must have the form tokens,tokens,...") from error
    if lengths[0] < 1 or len(set(lengths)) < len(lengths):
        raise UserError(f"--lengths {words!r}: must be distinct and >= 1")
    return lengths


def score_models(
    models: Sequence[LoadedRun], text: ScoredText, lengths: Sequence[int], seed: int
) -> list[dict[str, Any]]:
    """Return the description and the scores of each model, as plain values.

    Args:
        models: the first one is the base of comparisons.
        text: the text.
        lengths: tokens per window, ascending.
        seed: random seed of the bootstrap.
    """
    block_of = np.arange(len(text.tokens) - 1) // lengths[-1]
    resampling = Resampling(int(block_of[-1]) + 1, seed)
    base: dict[int, np.ndarray] = {}
    scored = []
    for model in models:
        graphdef, params, rest = split(model.model)
        bits = {
            length: make_token_scorer(graphdef, model.config, length)(params, rest, text.tokens)
            for length in lengths
        }
        first = math.log2(model.config.model.vocab_size)  # cost of the first token of the text
        rows = score_lengths(bits, base, block_of, resampling, text.size, first)
        scored.append(
            {
                "name": model.name,
                "overrides": list(model.overrides),
                "model": model.config.model.name,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "lengths": rows,
            }
        )
        base = base or bits
    return scored


def score_lengths(
    bits: dict[int, np.ndarray],
    base: dict[int, np.ndarray],
    block_of: np.ndarray,
    resampling: Resampling,
    size: int,
    first: float,
) -> list[dict[str, Any]]:
    """Return the scores of a model by the length of the window, as plain values.

    Args:
        bits: float64 [t] for each length, bits of each predicted token.
        base: bits of the same tokens under the first model; empty for the first model itself.
        block_of: int [t], window of the greatest length of each token.
        resampling: bootstrap over these windows.
        size: bytes of the text.
        first: bits of the first token of the text, which is not predicted.

    Returns:
        for each length: `length`; `bits_per_byte` with `interval`; `change` from the smallest
        length with `change_interval`; `difference` from the first model at this length with
        `difference_interval`; and `positions`, the bits per token by position in the window, with
        start, end, tokens, bits and interval.
    """
    blocks = int(block_of[-1]) + 1
    shortest = bits[min(bits)]

    def mean(values: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> Interval:
        windows = block_of[chosen]
        totals = np.bincount(windows, values[chosen], blocks)
        return resampling.mean(totals, np.bincount(windows, minlength=blocks))

    def per_byte(values: np.ndarray) -> list[float | None]:
        scale = len(values) / size
        return [None if x is None else x * scale for x in mean(values)]

    rows = []
    for length, own in bits.items():
        change = per_byte(own - shortest) if own is not shortest else [None] * 3
        compared = per_byte(own - base[length]) if base else [None] * 3
        place = np.arange(len(own)) % length
        edges = [edge for edge in position_edges(length) if edge <= place.max()] + [length]
        positions = []
        for start, end in pairwise(edges):
            inside = (place >= start) & (place < end)
            found = mean(own, inside)
            positions.append(
                {
                    "start": start,
                    "end": end,
                    "tokens": int(inside.sum()),
                    "bits": found.mean,
                    "interval": list(found[1:]),
                }
            )
        rows.append(
            {
                "length": length,
                "bits_per_byte": (float(own.sum()) + first) / size,
                "interval": per_byte(own)[1:],
                "change": change[0],
                "change_interval": change[1:],
                "difference": compared[0],
                "difference_interval": compared[1:],
                "positions": positions,
            }
        )
    return rows


def _variant(run: LoadedRun, words: str) -> LoadedRun:
    """Load the run with the overrides of a `--compare` option, after its own."""
    overrides = (*run.overrides, *shlex.split(words))
    config, model, step, _ = load_run(run.directory, overrides=overrides)
    return LoadedRun(run.directory, config, model, step, overrides)
