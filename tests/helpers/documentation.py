"""Pages of the documentation, their code blocks and commands."""

import re
import shlex
from functools import cache
from pathlib import Path

import typer
from typer.core import TyperGroup
from typer.main import get_command

from train.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "evidence" not in page.parts]
PLACEHOLDERS = ("CONFIG", "FILE", "...", "run.yaml")  # of a configuration, in place of a file
SKIP = "<!-- skip:"  # "<!-- skip: reason -->" on the line before a code block
FENCE = re.compile(r"^([^\n]*)\n```(\w*)\n(.*?)^```$", re.M | re.S)


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a language, without skipped ones."""
    blocks = FENCE.findall(page.read_text())
    return [code for before, name, code in blocks if name == language and SKIP not in before]


def commands(page: Path) -> list[list[str]]:
    """Return the words of each `mc` command in `sh` blocks and code spans, without `mc`.

    Environment variables before the command and comments after it are dropped, as are spans that
    only name a command.
    """
    lines = "\n".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]*\bmc [^`]+)`", FENCE.sub("", page.read_text()))
    found = []
    for line in [*lines, *spans]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                del words[0]
            if words[:1] == ["mc"]:
                found.append(words[1:])
    return found


@cache
def root_command() -> TyperGroup:
    return get_command(app)


def parse_command(words: list[str], *, names_only: bool = False) -> None:
    """Parse the words of an `mc` command without running it.

    Args:
        words: the words after `mc`; `PLACEHOLDERS` are read as a shipped configuration.
        names_only: accept a command without arguments.
    """
    command = root_command()
    words = ["demo" if word in PLACEHOLDERS else word for word in words]
    with typer.Context(command) as context:
        while hasattr(command, "commands") and words:
            name, *words = words
            assert name in command.commands, f"no command {name}"
            command = command.get_command(context, name)
        if words or not names_only:
            command.make_context(command.name, list(words))
