"""Prompts of `mc generate`: from the command line, a file of text, or a file of JSON lines."""

import json
from pathlib import Path
from typing import NamedTuple

from mc_core.errors import UserError
from train.evaluation.partial_output import OutputRow
from train.stdio import read_bytes

RESERVED_KEYS = ("completion", "tokens", "finish")  # reserved: keys of the output rows


class Prompt(NamedTuple):
    """A prompt, its name in messages, and its JSON object.

    The object has "prompt" and any further keys, which are copied to the output row.
    """

    name: str
    text: bytes
    row: OutputRow | None = None


def read_prompts(text: str | None, file: Path | None, lines: Path | None) -> list[Prompt]:
    """Read prompts from exactly one of `--prompt`, `--prompt-file` and `--prompts`.

    Files, and stdin for the path `-`, are read as UTF-8 in any locale. Invalid UTF-8 is kept in
    text files, for byte-level models, and is an error in JSON lines.

    Raises:
        UserError: not exactly one source is given, a prompt is empty, or a line is invalid.
        OSError: a file cannot be read.
    """
    given = [option is not None for option in (text, file, lines)]
    if sum(given) != 1:
        raise UserError("give one of --prompt TEXT, --prompt-file FILE, --prompts FILE.jsonl")
    if text is not None:
        prompts = [Prompt("--prompt", text.encode("utf-8", "surrogateescape"))]
    elif file is not None:
        prompts = [Prompt(str(file), read_bytes(file))]
    else:
        assert lines is not None
        rows = enumerate(read_bytes(lines).splitlines(), 1)
        prompts = [_read_line(f"{lines}: line {n}", line) for n, line in rows if line.strip()]
        if not prompts:
            raise UserError(f"{lines}: no prompt in this file")
    for prompt in prompts:
        if not prompt.text:
            raise UserError(f"{prompt.name}: the prompt is empty: must have at least one character")
    return prompts


def _read_line(name: str, line: bytes) -> Prompt:
    try:
        data = json.loads(line)
        json.dumps(data, allow_nan=False)
    except ValueError as error:  # of JSON, of UTF-8, or a number that is not finite
        raise UserError(f"{name}: {error}") from error
    if not isinstance(data, dict) or "prompt" not in data:
        raise UserError(f'{name}: must be an object with the key "prompt"')
    if not isinstance(data["prompt"], str):
        raise UserError(f"{name}: prompt = {json.dumps(data['prompt'])}: must be a string")
    for key in RESERVED_KEYS:
        if key in data:
            raise UserError(f'{name}: key "{key}": is reserved for the output: rename it')
    try:
        return Prompt(name, data["prompt"].encode(), data)
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: {error}") from error
