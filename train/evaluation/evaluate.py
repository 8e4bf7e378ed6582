"""`mc evaluate`: bits per byte of text, or recall accuracy by distance or depth."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from mc_core.config import MCConfig, ModelConfig
from mc_core.errors import UserError
from mc_core.files import to_bytes, to_json, write_atomic
from mc_core.footprint import flops_per_token, state_bytes
from mc_core.segmentation import check_streaming_config
from mc_core.tables import ResultTable, Row
from parity.environment import command, machine, result_table
from train.checkpoint import load_run
from train.config import TextConfig, TrainConfig
from train.config.recall_schema import Length, MQARConfig, NIAHConfig
from train.evaluation.evaluate_lengths import LengthReport, evaluate_lengths
from train.evaluation.evaluate_text import LoadedRun, TextEvaluation, evaluate_text
from train.evaluation.heads import TITLE, HeadReport, measure_heads
from train.evaluation.options import EvaluationOptions, check_text_options
from train.evaluation.recall_plots import draw_depths, draw_recall
from train.evaluation.score import UNITS, Answers, join, make_answer
from train.step import Tree, split
from train.tasks.examples import Draw, stack
from train.tasks.mqar import make_draws
from train.tasks.niah import Needles

EXAMPLES = {"mqar": 500, "niah": 20}  # default number per cell
HEAD_EXAMPLES = 4  # test examples on which recall and dead heads are measured
NIAH_OPTIONS = ("depths", "haystack", "value", "corpus")


@dataclass(frozen=True)
class Evaluation:
    """Accuracies with Wilson's 95% interval, as plain values.

    A score has the keys accuracy, low, high, right, asked (number of queries or needles) and loss.

    Attributes:
        task: `mqar` or `niah`.
        data: settings of the task.
        examples: number of examples per cell.
        seed: random seed of the test examples.
        cells: scores by tokens and pairs (mqar) or tokens (niah).
        parts: scores by tokens, and by distance (mqar: from key to query, in
            [`distance`, 2 `distance`)) or depth (niah: 0 to 1).
        size: size and cost of the model for the longest test examples; see `size_of`.
        heads: recall and dead heads on the longest test examples; None without a memory.
    """

    task: str
    data: dict[str, Any]
    examples: int
    seed: int
    cells: list[dict[str, float]]
    parts: list[dict[str, float]]
    size: dict[str, Any]
    heads: HeadReport | None = None
    command: str = field(default_factory=command)
    machine: dict[str, Any] = field(default_factory=machine)


def evaluate(
    directory: Path,
    options: EvaluationOptions,
    console: Console,
    *,
    json_file: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Evaluation | TextEvaluation | LengthReport:
    """Evaluate a run's last checkpoint, and print and write the results.

    `overrides` are changes of the configuration that need no new parameter; see `load_run`. The
    task `text` scores the run's validation text, or the text of `options.corpus`; with
    `options.lengths`, in windows of these lengths. With a mesh, the model and its batches are
    sharded over its devices.

    Raises:
        UserError: there is no checkpoint, or an option is not supported by the run or the task.
        OSError: a file cannot be read or written.
    """
    # MQAR needs no tokenizer.
    needs_text = options.task != MQARConfig.task
    loaded = load_run(directory, needs_text=needs_text, overrides=overrides, mesh=mesh)
    config, model, step, meta = loaded
    run = LoadedRun(directory, config, model, step, tuple(overrides))
    task = options.task or config.data.task
    if task == TextConfig.task:
        check_text_options(directory, config, options, plot)
        if options.lengths:
            files = {"json_file": json_file, "markdown": markdown, "plot": plot}
            return evaluate_lengths(run, meta, options, console, **files)
        return evaluate_text(run, options.corpus, console, json_file=json_file, markdown=markdown)
    if options.compare:
        raise UserError(f"--compare: not supported by --task {task}: use text with --lengths")
    data = task_of(config, options)
    graphdef, params, rest = split(model)
    found = run_tests(graphdef, params, rest, config, data, options)
    tokens = longest_examples(data, config.model.vocab_size, options.seed)
    found = dataclasses.replace(found, heads=measure_heads(model, tokens))
    title = f"{run.name}, step {step}: {task}"
    reports = tables(found, title)
    for report in reports:
        console.print(report.table())
    for line in (*(found.heads.notes if found.heads else ()), *reports[0].footer()):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_file:
        where = {"run": str(directory), "step": step, "overrides": run.overrides}
        content = where | dataclasses.asdict(found)
        write_atomic(json_file, to_json(content, indent=1).encode())
    if markdown:
        text = "\n".join(report.as_markdown() for report in reports)
        write_atomic(markdown, to_bytes(text))
    if plot:
        draw = draw_recall if task == "mqar" else draw_depths
        write_atomic(plot, draw(found.cells, found.parts, f"{title}\n{size_line(found.size)}"))
    return found


def task_of(config: TrainConfig, options: EvaluationOptions) -> MQARConfig | NIAHConfig:
    """Return the task settings of the run, or the defaults, updated with the options.

    Raises:
        UserError: an option is not supported by the task, or a value is not allowed.
    """
    task = options.task or config.data.task
    own = NIAH_OPTIONS if task == "niah" else ()
    for name in NIAH_OPTIONS:
        if getattr(options, name) is not None and name not in own:
            raise UserError(f"--{name}: not supported by --task {task}")
    changes = {name: getattr(options, name) for name in own if getattr(options, name) is not None}
    if options.examples is not None and options.examples < 1:
        raise UserError(f"--examples = {options.examples}: must be >= 1")
    try:
        if config.data.task == task:
            data = config.data
        elif task == "mqar":
            small = ((64, 4), (64, 8), (64, 16))
            data = MQARConfig(vocab_size=config.model.vocab_size, lengths=small)
        else:
            data = _needles_for(config)
        assert isinstance(data, MQARConfig | NIAHConfig)
        lengths: Any = _parse(options.lengths, task) if options.lengths else grid(data)
        data = dataclasses.replace(data, lengths=lengths, **changes)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--task {task}: {error}") from error
    if options.corpus and isinstance(data, NIAHConfig) and data.haystack != "essay":
        raise UserError(f"--corpus: not supported by --haystack {data.haystack}")
    return data


def _needles_for(config: TrainConfig) -> NIAHConfig:
    """Return the default needle task of a run, with the corpus and tokenizer of a text run."""
    if not isinstance(config.data, TextConfig):
        return NIAHConfig(tokenizer=config.tokenizer)
    data = config.data
    return NIAHConfig(
        corpus=data.corpus_paths,
        tokenizer=data.tokenizer,
        validation_fraction=data.validation_fraction,
    )


def longest_examples(data: MQARConfig | NIAHConfig, vocab_size: int, seed: int) -> np.ndarray:
    """Return the tokens, int32 [b, t], of the first test examples of the greatest length."""
    if isinstance(data, MQARConfig):
        (draw,) = make_draws(data, (max(data.lengths),), seed)
    else:
        draw = Needles(data, vocab_size, seed).draw(max(data.lengths))
    return stack([draw("test", i) for i in range(HEAD_EXAMPLES)]).tokens


def size_of(config: ModelConfig, data: MQARConfig | NIAHConfig, parameters: int) -> dict[str, Any]:
    """Return the number of parameters, and the state bytes and FLOPs for the longest example.

    `state_bytes` is `stream_bytes` after `tokens` tokens; `flops_per_token` is the average cost of
    the forward pass over these tokens.
    """
    tokens = data.max_tokens
    return {
        "parameters": parameters,
        "tokens": tokens,
        "state_bytes": stream_bytes(config, tokens),
        "flops_per_token": flops_per_token(config, tokens),
    }


def stream_bytes(config: ModelConfig, tokens: int) -> int | None:
    """Return the cache bytes after `tokens` streamed tokens; None if streaming is unsupported."""
    try:
        for layer in config.block_layers:
            if isinstance(layer, MCConfig):
                check_streaming_config(layer)
    except ValueError:
        return None
    return state_bytes(config, tokens)


def grid(data: MQARConfig | NIAHConfig) -> tuple[Any, ...]:
    """Return the default test lengths: all training lengths, and twice the longest one.

    For MQAR, these are all feasible combinations of tokens and pairs, where the numbers of pairs
    are also those of training and twice the largest one.
    """
    if isinstance(data, NIAHConfig):
        return tuple(sorted({*data.lengths, 2 * max(data.lengths)}))
    every_tokens, every_pairs = ({size[i] for size in data.lengths} for i in (0, 1))
    keys = data.vocab_size // 2 - 1
    return tuple(
        (tokens, pairs)
        for tokens in sorted({*every_tokens, 2 * max(every_tokens)})
        for pairs in sorted({*every_pairs, 2 * max(every_pairs)})
        if 4 * pairs <= tokens and pairs <= keys
    )


def _parse(words: str, task: str) -> tuple[Any, ...]:
    lengths: tuple[Any, ...]
    try:
        if task == "niah":
            lengths = tuple(int(word) for word in words.split(","))
        else:
            pairs = (word.split(":") for word in words.split(","))
            lengths = tuple((int(t), int(p)) for t, p in pairs)
    except ValueError as error:
        form = "tokens,tokens,..." if task == "niah" else "tokens:pairs,tokens:pairs,..."
        raise UserError(f"--lengths {words!r}: must have the form {form}") from error
    if len(set(lengths)) < len(lengths):
        raise UserError(f"--lengths {words!r}: must be distinct")
    return lengths


def run_tests(
    graphdef: nnx.GraphDef,
    params: Tree,
    rest: Tree,
    config: TrainConfig,
    data: MQARConfig | NIAHConfig,
    options: EvaluationOptions,
) -> Evaluation:
    """Evaluate a model on the test examples of `data`.

    Raises:
        UserError: the vocabulary of the model is too small, or the haystack text is invalid.
    """
    if config.model.vocab_size < data.min_vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: --task {data.task} needs "
            f"{data.min_vocab_size}"
        )
    count = options.examples or EXAMPLES[data.task]
    answer = make_answer(graphdef, config.run.batch_size)

    def ask(draw: Draw) -> Answers:
        return answer(params, rest, draw, "test", count)

    if isinstance(data, MQARConfig):
        draws = make_draws(data, data.lengths, options.seed)
        cells, parts = _by_distance(data.lengths, [ask(draw) for draw in draws])
    else:
        needles = Needles(data, config.model.vocab_size, options.seed)
        answers = [
            [ask(needles.draw(length, depth)) for depth in range(data.depths)]
            for length in data.lengths
        ]
        cells, parts = _by_depth(data.lengths, answers)
    settings = dataclasses.asdict(data) | {"lengths": [*data.lengths]}
    size = size_of(config.model, data, sum(leaf.size for leaf in jax.tree.leaves(params)))
    return Evaluation(data.task, settings, count, options.seed, cells, parts, size)


def _by_distance(lengths: Sequence[Length], answers: list[Answers]) -> tuple[list, list]:
    cells = [
        {"tokens": tokens, "pairs": pairs} | one.score().as_dict()
        for (tokens, pairs), one in zip(lengths, answers, strict=True)
    ]
    parts = []
    for size in sorted({tokens for tokens, _ in lengths}):
        own = join([one for (t, _), one in zip(lengths, answers, strict=True) if t == size])
        power = np.log2(np.maximum(own.distances, 1)).astype(int)
        for exponent in np.unique(power[own.weights > 0]):
            score = own.score(power == exponent)
            parts.append({"tokens": size, "distance": 2 ** int(exponent)} | score.as_dict())
    return cells, parts


def _by_depth(lengths: Sequence[int], answers: list[list[Answers]]) -> tuple[list, list]:
    cells, parts = [], []
    for length, own in zip(lengths, answers, strict=True):
        cells.append({"tokens": length} | join(own).score(whole=True).as_dict())
        for depth, one in enumerate(own):
            where = depth / max(len(own) - 1, 1)
            parts.append({"tokens": length, "depth": where} | one.score(whole=True).as_dict())
    return cells, parts


def tables(found: Evaluation, title: str) -> list[ResultTable]:
    """Return the tables of cells, of parts with one column per number of tokens, and of recall."""
    unit = UNITS[found.task]
    rows = [
        {name: cell[name] for name in ("tokens", "pairs") if name in cell} | _shown(cell, unit)
        for cell in found.cells
    ]
    by = "distance" if found.task == "mqar" else "depth"
    maps: dict[float, Row] = {}
    for part in sorted(found.parts, key=lambda part: part[by]):
        words = (
            f"{part[by]:.0f} to {2 * part[by] - 1:.0f}" if by == "distance" else f"{part[by]:.0%}"
        )
        row = maps.setdefault(part[by], {by: words})
        interval = f"{100 * part['low']:.0f}-{100 * part['high']:.0f}"
        row[f"{part['tokens']:,} tokens"] = f"{100 * part['accuracy']:.3g} ({interval})"
    notes = [
        size_line(found.size),
        f"{found.examples} test examples per cell, seed {found.seed}",
        "from, to, and in parentheses: Wilson's 95% interval",
    ]
    reports = [
        result_table(title, rows, notes),
        result_table(f"{title}: accuracy % by {by}", [*maps.values()], notes),
    ]
    if found.heads:
        reports.append(result_table(f"{title}: {TITLE}", found.heads.rows, found.heads.notes))
    return reports


def size_line(size: dict[str, Any]) -> str:
    """Return the size and cost of a model as text."""
    state = "streaming unsupported"
    if size["state_bytes"] is not None:
        state = f"{size['state_bytes']:,} bytes of state after {size['tokens']:,} tokens"
    flops = f"{size['flops_per_token'] / 1e3:,.3g} kFLOP per token"
    return f"{size['parameters']:,} parameters; {state}; {flops}"


def _shown(score: dict[str, float], unit: str) -> Row:
    return {
        "accuracy %": 100 * score["accuracy"],
        "from %": 100 * score["low"],
        "to %": 100 * score["high"],
        "loss": score["loss"],
        unit: score["asked"],
    }
