"""`mc evaluate`, `mc inspect` and `mc generate`. Commands import lazily, to start quickly."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mc_core.errors import UserError
from train.cli.options import (
    OVERRIDES,
    config_option,
    mesh_option,
    opened_mesh,
    output_file,
    utf8,
)


class CacheDevice(StrEnum):
    """Device of the cached memories."""

    DEVICE = "device"
    HOST = "host"


class CacheDtype(StrEnum):
    """Dtype of the cached memories."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class TaskName(StrEnum):
    """Task of a test."""

    TEXT = "text"
    MQAR = "mqar"
    NIAH = "niah"


def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [KEY=VALUE]...",
            help="run directory, several with --recall; changes of the model, such as "
            "model.layer.aggregation=mean",
        ),
    ],
    task: Annotated[TaskName | None, typer.Option(show_default="the run's")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="64:4,128:8 (mqar: tokens:pairs) or 512,1024 (niah; text: tokens per window)",
            show_default="to twice the run's",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            help="number of examples per length and depth", show_default="mqar 500, niah 20"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="random seed of the test examples, or of the bootstrap")
    ] = 0,
    depths: Annotated[
        int | None, typer.Option(help="niah: number of depths", show_default="40")
    ] = None,
    haystack: Annotated[str | None, typer.Option(help="niah: noise or essay")] = None,
    value: Annotated[str | None, typer.Option(help="niah: number or uuid")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="a file or folder; text: all of it is scored, in place of the validation text; "
            "niah: its held-out share is the essay; may be repeated"
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'KEY=VALUE ...'",
            help="text with --lengths: also score the run with these changes; may be repeated",
        ),
    ] = None,
    json: Annotated[Path | None, output_file("output file of the numbers, as JSON")] = None,
    markdown: Annotated[Path | None, output_file("output file of the tables, as Markdown")] = None,
    plot: Annotated[
        Path | None,
        output_file("mqar, niah, --recall and text with --lengths: output file of a plot, as PNG"),
    ] = None,
    recall: Annotated[
        bool,
        typer.Option(
            "--recall",
            help="text: bits of the tokens that complete an n-gram of the same window, by distance "
            "and by count in the training text; further runs are compared with the first one",
        ),
    ] = False,
    ngram: Annotated[
        int | None,
        typer.Option(
            min=2, help="--recall: tokens per n-gram", show_default="5 bytes or 2 subwords"
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help="--recall: predicted tokens per window", show_default="data.window"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="--recall: folder of recall.json, recall.md and recall.png",
            file_okay=False,
            show_default="RUN/recall",
        ),
    ] = None,
    mesh: Annotated[str | None, mesh_option()] = None,
) -> None:
    """Score a run's last checkpoint: bits per byte of text, or accuracy on a recall task."""
    from train.config.overrides import split_words
    from train.evaluation.evaluate import evaluate as score
    from train.evaluation.evaluate_recall import RecallOptions, evaluate_recall
    from train.evaluation.options import EvaluationOptions

    files = tuple(corpus) if corpus else None
    runs, overrides = split_words(words)
    options = EvaluationOptions(
        task, lengths, examples, seed, depths, haystack, value, files, tuple(compare or ())
    )
    if recall:
        outputs = RecallOptions(ngram, window, out, json, markdown, plot)
        evaluate_recall(runs, options, outputs, Console(), overrides, mesh=opened_mesh(mesh))
        return
    for name, given in (("ngram", ngram), ("window", window), ("out", out)):
        if given is not None:
            raise UserError(f"--{name}: needs --recall")
    if len(runs) != 1:
        raise UserError(f"{len(runs)} runs: give one, or compare them with --recall")
    files_out = {"json_file": json, "markdown": markdown, "plot": plot}
    devices = opened_mesh(mesh)
    score(runs[0], options, Console(), **files_out, overrides=overrides, mesh=devices)


def inspect(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="run directory")] = None,
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    *,
    text: Annotated[Path, typer.Option(help="text file")],
    random: Annotated[
        Path | None,
        config_option("in place of RUN: YAML file of a run, whose model has not been trained"),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="output file of the numbers, as JSON", dir_okay=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="output folder", show_default="RUN/inspect, or inspect with --random"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="at most N, from the text's start", show_default="4096")
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(help="words of the text; report the gate weights of their segment"),
    ] = None,
) -> None:
    """Show the gates, memory norms and inner losses of a model, token by token."""
    from train.evaluation.inspect import inspect as run_inspection
    from train.evaluation.traces import load_trained, make_untrained

    words = overrides or []
    if random is not None:
        words = words if run is None else [str(run), *words]
        source, folder = make_untrained(random, words), Path("inspect")
    elif run is not None:
        source, folder = load_trained(run, words), run / "inspect"
    else:
        raise UserError("RUN: give a run directory, or the YAML file of a run with --random")
    run_inspection(
        source,
        text,
        Console(),
        json_file=json,
        output=output or folder,
        tokens=tokens,
        needle=None if needle is None else utf8(needle),
    )


def generate(
    run: Annotated[
        Path, typer.Argument(help="a run's folder, or a .safetensors file of mc convert")
    ],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    *,
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="a file with the text; - is stdin")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='a file of lines {"prompt": "..."}, further keys are copied; - is stdin'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="maximum number of new tokens")] = 200,
    temperature: Annotated[float, typer.Option(help="0: greedy decoding")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="sample from the K most likely tokens")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="sample from the most likely tokens up to this total probability"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="sample from tokens with at least this share of the top probability"),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="penalty of tokens of the prompt and the completion; 1: none")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="stop string, not part of the completion; may be repeated"),
    ] = None,
    cache_dtype: Annotated[
        CacheDtype, typer.Option(help="dtype of cached memories")
    ] = CacheDtype.FLOAT32,
    cache_device: Annotated[
        CacheDevice, typer.Option(help="host: in host memory; each step copies what it reads")
    ] = CacheDevice.DEVICE,
    batch_size: Annotated[int, typer.Option(help="prompts per batch")] = 8,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, or bytes", show_default="the run's")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="a new file for one JSON object per prompt; resumed after an interrupt"),
    ] = None,
    mesh: Annotated[str | None, mesh_option()] = None,
) -> None:
    """Continue one or many prompts: text to stdout, tokens per second to stderr."""
    from train.evaluation.generate import GenerationOptions
    from train.evaluation.generate import run as run_generation
    from train.evaluation.prompts import read_prompts

    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stops=tuple(map(utf8, stop or ())),
        cache_dtype=cache_dtype,
        cache_device=cache_device,
        batch_size=batch_size,
    )
    given = read_prompts(prompt, prompt_file, prompts)
    run_generation(
        run,
        given,
        options,
        tokenizer=tokenizer,
        overrides=overrides or (),
        output=output,
        as_lines=prompts is not None,
        mesh=opened_mesh(mesh),
    )
