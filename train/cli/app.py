"""The command `mc`, its groups, and one-line error messages.

Commands import their dependencies when they run, because some take seconds to import.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mc_core.errors import NotFiniteError, UserError
from train.cli.bench import app as bench
from train.cli.evaluation import evaluate, generate, inspect
from train.cli.harness import harness
from train.cli.information import configs, segments, variants
from train.cli.parity import app as parity
from train.cli.planning import plan
from train.cli.tokenizing import tokenize, tokenizer_app
from train.cli.training import demo, sweep, train
from train.cli.weights import convert, export
from train.interrupt import Terminated, sigterm_as_interrupt
from train.stdio import replace_unencodable
from train.user_modules import OPTION, import_modules

# `mc` is also Midnight Commander, and the command of the package `memory-caching`.
PROGRAMS = ("mc", "memory-caching")


class InterruptedCommandError(Exception):
    """A command was ended by a signal."""


class Commands(TyperGroup):
    """Group of commands that preserves the messages of interrupts, which Typer drops."""

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
            help="import a module or .py file first, for example to register a memory; may be "
            "repeated",
        ),
    ] = None,
) -> None:
    """Memory Caching: RNNs with growing memory (arXiv:2602.24281)."""
    import_modules(imports or ())


app.add_typer(parity, name="parity")
app.add_typer(bench, name="bench")
app.add_typer(tokenizer_app, name="tokenizer")


for command in (
    demo,
    train,
    sweep,
    tokenize,
    evaluate,
    harness,
    inspect,
    generate,
    convert,
    export,
    plan,
    variants,
    segments,
    configs,
):
    app.command()(command)

# Base class of the usage errors of Typer's own copy of click.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main() -> None:
    """Run the command; user errors are printed in one line, with exit code 2."""
    replace_unencodable()
    try:
        with sigterm_as_interrupt():
            code = app(standalone_mode=False, prog_name=program())
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
    if distributed := sys.modules.get("train.distributed"):
        distributed.leave(code)
    sys.exit(code)


def program() -> str:
    """Return the name under which the command was called, for its help."""
    name = Path(sys.argv[0]).stem
    return name if name in PROGRAMS else PROGRAMS[0]


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _fail(message: str, code: int) -> int:
    print("mc:", " ".join(message.split()), file=sys.stderr)
    return code
