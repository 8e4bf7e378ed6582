"""`mc harness`. The command imports lazily, to start quickly."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from train.cli.options import OVERRIDES, output_file


def harness(
    run: Annotated[
        Path, typer.Argument(help="a run's folder, or a .safetensors file of mc convert")
    ],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    *,
    tasks: Annotated[
        str,
        typer.Option(
            help="tasks, groups or files of lm-eval, with commas between; also mc-commonsense, "
            "mc-recall, mc-longbench and mc-ruler"
        ),
    ],
    limit: Annotated[
        float | None, typer.Option(help="examples per task; below 1: their share")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="examples in the context", show_default="the task's")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="folder with further task files; may be repeated")
    ] = None,
    batch_size: Annotated[
        str, typer.Option(help="sequences per batch, or auto: about 16,384 tokens")
    ] = "auto",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="maximum number of tokens: longer contexts are truncated in the middle",
            show_default="none",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, or bytes", show_default="the run's")
    ] = None,
    output: Annotated[Path | None, output_file("output file of lm-eval's results, as JSON")] = None,
    markdown: Annotated[Path | None, output_file("output file of the table, as Markdown")] = None,
) -> None:
    """Run tasks of lm-eval on a run: log-likelihoods, perplexity and generation."""
    from train.harness.command import HarnessOptions
    from train.harness.command import harness as run_harness

    options = HarnessOptions(
        tasks=tuple(task for task in tasks.split(",") if task),
        limit=limit,
        num_fewshot=num_fewshot,
        include=tuple(include_path or ()),
        batch_size=batch_size,
        max_length=max_length,
        tokenizer=tokenizer,
    )
    run_harness(
        run, options, Console(), overrides=overrides or (), output=output, markdown=markdown
    )
