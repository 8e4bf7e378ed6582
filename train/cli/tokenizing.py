"""`mc tokenize` and `mc tokenizer`. Commands import lazily, to start quickly."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mc_core.errors import UserError
from train.cli.options import output_file

tokenizer_app = typer.Typer(help="Train a tokenizer.", no_args_is_help=True)

CORPUS = "files, folders, stdlib or site-packages; lines of .jsonl files are documents"


def tokenize(
    corpus: Annotated[list[str], typer.Argument(metavar="CORPUS...", help=CORPUS)],
    out: Annotated[Path, typer.Option(help="output folder", file_okay=False)],
    tokenizer: Annotated[
        str, typer.Option(metavar="FILE", help="tokenizer.json, or bytes")
    ] = "bytes",
    separator: Annotated[
        str | None,
        typer.Option(help="after each document, as data.separator", show_default="end of text"),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="held-out share of the documents")
    ] = 0.05,
    shard_bytes: Annotated[int, typer.Option(min=1, help="text of a shard, in bytes")] = 2**27,
    field: Annotated[str, typer.Option(help="key of the text in .jsonl files")] = "text",
    jobs: Annotated[
        int | None, typer.Option(min=1, help="number of processes", show_default="all cores")
    ] = None,
) -> None:
    """Write a corpus as shards of tokens for data.corpus; the same command resumes."""
    from train.shards.plan import ShardOptions
    from train.shards.tokenize import tokenize as run

    options = ShardOptions(tokenizer, separator, validation_fraction, shard_bytes, field)
    run(corpus, out, options, jobs or os.cpu_count() or 1, Console())


@tokenizer_app.command("train")
def train_tokenizer(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|CORPUS...",
            help="YAML file of a run and KEY=VALUE changes; with --out, a corpus",
        ),
    ],
    out: Annotated[
        Path | None, output_file("output file", show_default="data.tokenizer of CONFIG")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="number of tokens", show_default="model.vocab_size of CONFIG")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="share of the documents that is not used")
    ] = 0.05,
    train_bytes: Annotated[
        int, typer.Option(min=1, help="maximum bytes of text; a random selection of documents")
    ] = 2**28,
    field: Annotated[str, typer.Option(help="key of the text in .jsonl files")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on the training text of a run, or on a corpus."""
    from train.data.train_tokenizer import CorpusOptions, train_for_config, train_on_corpus

    if out is None:
        from train.config import load_config
        from train.shipped_configs import find_config

        if vocab_size is not None:
            raise UserError(
                f"--vocab-size = {vocab_size}: needs --out FILE and a corpus; a run has "
                "model.vocab_size"
            )
        train_for_config(load_config(find_config(Path(sources[0])), sources[1:]), Console())
    elif vocab_size is None:
        raise UserError("--vocab-size is missing: it is needed with --out")
    else:
        options = CorpusOptions(vocab_size, validation_fraction, train_bytes, field)
        train_on_corpus(sources, out, options, Console())
