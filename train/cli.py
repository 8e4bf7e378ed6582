"""The command `mc`. Each command imports what it runs: some libraries take seconds to import."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from mc_core import segment_lengths
from mc_core.errors import NotFiniteError, UserError
from train.bench_cli import app as bench
from train.interrupt import Terminated, sigterm_as_interrupt
from train.options import output_file
from train.parity_cli import app as parity
from train.stdio import replace_unencodable
from train.user_modules import OPTION, import_modules


class InterruptedCommandError(Exception):
    """A command that a signal ended."""


class Commands(TyperGroup):
    """Commands whose interrupts keep their messages, which Typer drops."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command of a context."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedCommandError from error


app = typer.Typer(
    cls=Commands,
    help="Memory Caching: RNNs with growing memory (arXiv:2602.24281).",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    imports: Annotated[
        list[str] | None,
        typer.Option(
            OPTION,
            metavar="MODULE",
            help="import this module or .py file first, for instance to register a memory; may be "
            "repeated",
        ),
    ] = None,
) -> None:
    """Memory Caching: RNNs with growing memory (arXiv:2602.24281)."""
    import_modules(imports or ())


app.add_typer(parity, name="parity")
app.add_typer(bench, name="bench")


class Segmentation(StrEnum):
    """How tokens are cut into segments."""

    CONSTANT = "constant"
    LOGARITHMIC = "logarithmic"


class WeightsFormat(StrEnum):
    """What weights are kept in."""

    RUN = "run"
    SAFETENSORS = "safetensors"
    TORCH = "torch"


class SourceFormat(StrEnum):
    """What weights are read from."""

    RUN = "run"
    SAFETENSORS = "safetensors"
    TORCH = "torch"
    COMMUNITY = "community"


class CacheDevice(StrEnum):
    """In whose memory cached memories lie."""

    DEVICE = "device"
    HOST = "host"


class CacheDtype(StrEnum):
    """What cached memories are kept in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class TaskName(StrEnum):
    """What a run is scored on."""

    TEXT = "text"
    MQAR = "mqar"
    NIAH = "niah"


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/demo.yaml")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="run.steps=100 ...")
    ] = None,
) -> None:
    """Train a language model; resume an interrupted run, or extend one by a larger run.steps."""
    from train.config import load_config

    loaded = load_config(config, overrides or ())
    from bench.devices import request
    from train.loop import train as run

    request(loaded.run.devices)
    run(loaded, Console())


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(metavar="SWEEP", help="a sweep's YAML file")],
    jobs: Annotated[int, typer.Option(help="runs at a time, each with cores of its own")] = 1,
    markdown: Annotated[
        Path | None, typer.Option(help="write the table here", dir_okay=False)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="draw what was found here", dir_okay=False, show_default="sweep.png"),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="results.jsonl of an earlier sweep, to be shown beside this one's"),
    ] = None,
) -> None:
    """Train and test many runs of one task, or go on with a sweep that was interrupted."""
    from train.sweep.run import sweep as run

    run(config, Console(), jobs=jobs, markdown=markdown, plot=plot, recorded=recorded)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="a run's directory")],
    task: Annotated[TaskName | None, typer.Option(show_default="the run's")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="64:4,128:8 (mqar: tokens:pairs) or 512,1024 (niah)",
            show_default="to twice the run's",
        ),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="of a length and depth", show_default="mqar 500, niah 20")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the test examples")] = 0,
    depths: Annotated[int | None, typer.Option(help="niah: how many", show_default="40")] = None,
    haystack: Annotated[str | None, typer.Option(help="niah: noise or essay")] = None,
    value: Annotated[str | None, typer.Option(help="niah: number or uuid")] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="a file or folder; text: all of it is scored, in place of the validation text; "
            "niah: its held-out share is the essay; may be repeated"
        ),
    ] = None,
    json: Annotated[Path | None, output_file("write the numbers here")] = None,
    markdown: Annotated[Path | None, output_file("write the tables here")] = None,
    plot: Annotated[
        Path | None, output_file("mqar and niah: draw the accuracy here, as PNG")
    ] = None,
) -> None:
    """Score a run's last checkpoint: bits per byte of text, or accuracy on a recall task."""
    from train.tasks.evaluate import Options
    from train.tasks.evaluate import evaluate as score

    files = tuple(corpus) if corpus else None
    options = Options(task, lengths, examples, seed, depths, haystack, value, files)
    score(run, options, Console(), json_file=json, markdown=markdown, plot=plot)


@app.command()
def inspect(
    run: Annotated[Path, typer.Argument(help="a run's directory")],
    text: Annotated[Path, typer.Option(help="a file of text")],
    json: Annotated[
        Path | None, typer.Option(help="write the numbers to this file, too", dir_okay=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder of page and pictures", show_default="RUN/inspect")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="at most so many, from the text's start", show_default="4096")
    ] = None,
    needle: Annotated[
        str | None, typer.Option(help="words of the text: do the gates point at their segment?")
    ] = None,
) -> None:
    """Show what a run's gates weigh and its memories learn, token by token."""
    from train.inspect import inspect as look

    words = None if needle is None else _utf8(needle)
    look(run, text, Console(), json_file=json, output=output, tokens=tokens, needle=words)


@app.command()
def generate(
    run: Annotated[
        Path, typer.Argument(help="a run's folder, or a .safetensors file of mc convert")
    ],
    prompt: Annotated[str | None, typer.Option(help="the text to go on with")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="a file with that text, taken as it is; - is stdin")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='a file of lines {"prompt": "..."}, further keys are kept; - is stdin'),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="the most tokens of a completion")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from the likeliest K tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="draw from the fewest that have this probability together")
    ] = None,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="ends a completion, and is cut off; may be repeated")
    ] = None,
    cache_dtype: Annotated[
        CacheDtype, typer.Option(help="of the cached memories")
    ] = CacheDtype.FLOAT32,
    cache_device: Annotated[
        CacheDevice, typer.Option(help="host: in its memory, whence each step moves what it reads")
    ] = CacheDevice.DEVICE,
    batch_size: Annotated[int, typer.Option(help="prompts that go on together")] = 8,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer.json, or bytes", show_default="the run's")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="a new file for one JSON object per prompt; resumed after an interrupt"),
    ] = None,
) -> None:
    """Go on with a text, or with many: text to stdout, tokens per second to stderr."""
    from train.generate import Options, read_prompts
    from train.generate import run as go_on

    options = Options(
        max_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        tuple(map(_utf8, stop or ())),
        cache_dtype,
        cache_device,
        batch_size,
    )
    given = read_prompts(prompt, prompt_file, prompts)
    go_on(run, given, options, tokenizer=tokenizer, output=output, as_lines=prompts is not None)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a run's directory, a .safetensors or .pt file")],
    target: Annotated[Path, typer.Argument(help="what to write; must not exist")],
    source_format: Annotated[
        SourceFormat | None,
        typer.Option("--from", help="community: see docs/migration.md", show_default="by the path"),
    ] = None,
    target_format: Annotated[
        WeightsFormat | None, typer.Option("--to", show_default="by the path")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="the YAML file of a run to be written")
    ] = None,
) -> None:
    """Convert weights between a run, a safetensors file and a PyTorch state_dict."""
    from train.config import load_config

    loaded = None if config is None else load_config(config)
    from train.convert import convert as run

    run(source, target, source_format, target_format, loaded, Console())


@app.command()
def variants() -> None:
    """List the memories and the aggregations, and what each is."""
    from train.variants import print_variants

    print_variants(Console())


@app.command()
def segments(
    length: Annotated[int, typer.Option(help="number of tokens")],
    segmentation: Segmentation = Segmentation.CONSTANT,
    segment_size: Annotated[int, typer.Option(help="tokens of a constant segment")] = 256,
) -> None:
    """Print the lengths of the segments that a number of tokens is cut into."""
    try:
        lengths = segment_lengths(length, segmentation, segment_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(*lengths, sep=", ")


# Typer carries its own copy of click; this is the base of its usage errors.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run the command; an error that the user can put right is one line and exit code 2."""
    replace_unencodable()
    try:
        with sigterm_as_interrupt():
            code = app(standalone_mode=False, prog_name="mc")
    except (UserError, OSError) as error:
        code = _fail(_describe(error), 2)
    except UsageError as error:
        code = _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except NotFiniteError as error:
        code = _fail(str(error), 1)
    except InterruptedCommandError as error:
        signal = error.__cause__
        code = _fail(str(signal) or "interrupted", 143 if isinstance(signal, Terminated) else 130)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", 130)
    sys.exit(code)


def _utf8(word: str) -> str:
    """Return a word of the command line as the UTF-8 text that it is in any locale.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return word.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{word}: must be UTF-8 text") from error


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _fail(message: str, code: int) -> int:
    print("mc:", " ".join(message.split()), file=sys.stderr)
    return code
