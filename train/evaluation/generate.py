"""Text from a trained model: `mc generate`, and the sample at the end of a run."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from mc_core.errors import NotFiniteError, UserError
from mc_core.generation import SEEDS, check_sampling
from mc_jax import LanguageModel, generate
from mc_jax.sharding import shard_model
from train.checkpoint import load_run
from train.config.overrides import override_model
from train.data.tokenizer import load_tokenizer, make_encoder
from train.data.tokenizer_copy import tokenizer_of_file
from train.evaluation.completion import Completion, make_decoder, printable
from train.evaluation.partial_output import OutputRow, Partial
from train.evaluation.prompts import RESERVED_KEYS, Prompt
from train.stdio import is_terminal, json_line, print_bytes
from train.step import split
from train.variant import make_variant


@dataclass(frozen=True)
class GenerationOptions:
    """Options of generation.

    Attributes:
        max_tokens: maximum number of new tokens.
        temperature: 0 is greedy.
        top_k: as in `mc_jax.sample`.
        top_p: as in `mc_jax.sample`.
        min_p: as in `mc_jax.sample`.
        repetition_penalty: as in `mc_jax.generate`.
        seed: random seed.
        stops: strings that end a completion; they are not part of it.
        cache_dtype: dtype of cached memories, `float32` or `bfloat16`.
        cache_device: device of cached memories, `device` or `host`.
        batch_size: prompts per batch; has no effect on a completion.

    Raises:
        UserError: an option is invalid; the message has option, value and allowed values.
    """

    max_tokens: int = 200
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    cache_dtype: str = "float32"
    cache_device: str = "device"
    batch_size: int = 8

    def __post_init__(self) -> None:
        try:
            check_sampling(
                self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        for name in ("max_tokens", "batch_size"):
            if (number := getattr(self, name)) < 1:
                raise UserError(f"{name} = {number}: must be >= 1")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed = {self.seed}: must be in 0..{SEEDS - 1}")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and (value := getattr(self, name)) is not None:
                raise UserError(f"{name} = {value}: needs temperature > 0; 0 is greedy")
        if "" in self.stops:
            raise UserError("stop = '': must have at least one character")


@dataclass
class Speed:
    """Seconds and tokens of prefill and decoding; the first new token counts as prefill."""

    compile_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{what} {tokens:,} tokens in {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s"
            for what, tokens, seconds in (
                ("prompt", self.prompt_tokens, self.prompt_seconds),
                ("new", self.new_tokens, self.new_seconds),
            )
            if tokens
        ]
        return "; ".join([f"compiled in {self.compile_seconds:.1f} s", *parts])


Show = Callable[[int, str], Any]


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    speed: Speed,
    *,
    first_row: int = 0,
    show: Show = lambda row, text: None,
    **more: Any,
) -> list[Completion]:
    """Continue one batch of prompts.

    Args:
        model: language model.
        tokenizer: tokenizer of the model; None = bytes.
        prompts: at least one prompt.
        options: generation options.
        speed: updated with the measured times.
        first_row: row number of the first prompt; seeds its random stream.
        show: called with the row in the batch and its next piece of text.
        more: further arguments of `mc_jax.generate`.

    Raises:
        UserError: a prompt has no token or is not valid text, or the model cannot stream.
        NotFiniteError: the model's logits are not finite.
    """
    tokens = [_encode(prompt, tokenizer) for prompt in prompts]
    names = [prompt.name for prompt in prompts]
    rows = range(first_row, first_row + len(prompts))
    return complete_tokens(
        model, tokenizer, tokens, options, speed, names=names, rows=rows, show=show, **more
    )


def complete_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    tokens: Sequence[np.ndarray],
    options: GenerationOptions,
    speed: Speed,
    *,
    names: Sequence[str],
    rows: Sequence[int],
    show: Show = lambda row, text: None,
    fill: int = 0,
    **more: Any,
) -> list[Completion]:
    """Continue one batch of prompts, given as ids; see `complete`.

    Args:
        model: language model.
        tokenizer: tokenizer of the model; None = bytes.
        tokens: ids of each prompt, at least one.
        options: generation options.
        speed: updated with the measured times.
        names: name of each prompt in messages.
        rows: index of the random stream of each prompt.
        show: called with the row in the batch and its next piece of text.
        fill: number of rows that the batch is filled up to, so that batches share their programs.
            The capacity of the cache is then a power of two.
        more: further arguments of `mc_jax.generate`.

    Raises:
        UserError: the model cannot stream.
        NotFiniteError: the model's logits are not finite.
    """
    extra = max(0, fill - len(tokens))
    filled = [*tokens, *[np.zeros(1, np.int32)] * extra]
    longest = max(map(len, filled))
    total = longest + options.max_tokens
    began = time.perf_counter()
    try:
        steps = generate(
            model,
            filled,
            (1 << (total - 1).bit_length()) - longest if fill else options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            rows=[*rows, *[0] * extra],
            cache_dtype=options.cache_dtype,
            cache_device=options.cache_device,
            **more,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    completions = [
        Completion(make_decoder(tokenizer, ids), options.max_tokens, options.stops)
        for ids in (ids.tolist() for ids in tokens)
    ]
    marks = [began, time.perf_counter()]
    for step in steps:
        new = np.asarray(step).tolist()
        if len(marks) == 2:
            marks.append(time.perf_counter())
        for number, (row, token) in enumerate(zip(completions, new, strict=False)):
            if row.finish:
                continue
            if token < 0:
                raise NotFiniteError(
                    f"{names[number]}: the logits after {row.tokens} new tokens are not finite"
                )
            if text := row.push(token):
                show(number, text)
        if all(row.finish for row in completions):
            break
    compile_s, prefill_s, decode_s = np.diff([*marks, time.perf_counter()])
    speed.compile_seconds += compile_s
    speed.prompt_tokens += sum(map(len, tokens))
    speed.prompt_seconds += prefill_s
    speed.new_tokens += sum(row.tokens for row in completions) - len(completions)
    speed.new_seconds += decode_s
    return completions


def load_source(
    source: Path,
    tokenizer: str | None,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Return a model and its tokenizer, None for bytes.

    Args:
        source: run directory, or `.safetensors` file of a language model. If the file does not
            declare its tokenizer, a vocabulary of 256 means bytes.
        tokenizer: `bytes`, or the path of a `tokenizer.json` that equals the one used in training;
            None = from `source`.
        overrides: as in `load_run`; of a file, only keys of the model.
        mesh: devices over which the model is sharded; None = one device.

    Raises:
        UserError: `source` cannot be loaded, its tokenizer is unknown, or an override is invalid.
        OSError: a file cannot be read.
    """
    if source.suffix == ".safetensors" and not source.is_dir():
        try:
            model = LanguageModel.from_pretrained(source)
        except ValueError as error:
            raise UserError(str(error)) from error
        size = model.config.vocab_size
        if overrides:
            model = make_variant(model, override_model(model.config, overrides), overrides)
        shard_model(model, mesh)
        return model, load_tokenizer(tokenizer_of_file(source, size, tokenizer), size)
    if source.is_file():
        raise UserError(f"{source}: must be a run directory or a .safetensors file")
    config, model, *_ = load_run(source, tokenizer, overrides=overrides, mesh=mesh)
    return model, load_tokenizer(config.tokenizer, config.model.vocab_size)


def run(
    source: Path,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    *,
    tokenizer: str | None,
    output: Path | None,
    as_lines: bool,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Speed:
    """Continue prompts; stream text to stdout, and print the speed to stderr.

    With `output`, rows of finished batches are saved to a partial file, from which a later call
    with the same arguments resumes. A row depends on its number, not on its batch.

    Args:
        source: see `load_source`.
        prompts: from `read_prompts`.
        options: generation options.
        tokenizer: see `load_source`.
        output: output file of one JSON object per prompt; must not exist.
        as_lines: without `output`, print JSON objects instead of text.
        overrides: see `load_source`.
        mesh: see `load_source`.

    Raises:
        UserError: as `load_source` and `complete`, or `output` cannot be written, is being written
            by another process, or has a partial file of other settings.
        OSError: a file cannot be read or written.
        NotFiniteError: the model's logits are not finite.
        KeyboardInterrupt: the message states how many rows are saved.
    """
    if output is not None and not output.parent.is_dir():
        raise UserError(f"{output}: its folder does not exist")
    with nullcontext() if output is None else closing(Partial.lock(output)) as lock:
        if lock is not None:
            lock.acquire()
        if output is not None and output.exists():
            raise UserError(f"{output}: exists: use another --output")
        model, words = load_source(source, tokenizer, overrides, mesh)
        for prompt in prompts:
            _encode(prompt, words)
        partial = None
        if output is not None:
            partial = Partial(output, _settings(model, words, options), list(map(_key, prompts)))
            if partial.rows:
                print(f"resuming {output}: {partial}", file=sys.stderr)
        speed = _run_batches(model, words, prompts, options, partial, as_lines)
        if partial is not None:
            partial.finish()
    if is_terminal() and not as_lines:
        print()
    print(speed, file=sys.stderr)
    return speed


def _run_batches(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    partial: Partial | None,
    as_lines: bool,
) -> Speed:
    """Continue the prompts that have no row in `partial`; print the text or add it to `partial`."""
    speed, terminal = Speed(), is_terminal()

    def show(row: int, text: str) -> None:
        if not as_lines:
            print(printable(text) if terminal else text, end="", flush=True)

    done = len(partial.rows) if partial else 0
    try:
        for first in range(done, len(prompts), options.batch_size):
            batch = prompts[first : first + options.batch_size]
            texts = complete(model, tokenizer, batch, options, speed, first_row=first, show=show)
            rows = [_to_row(prompt, text) for prompt, text in zip(batch, texts, strict=True)]
            if partial is not None:
                partial.add(rows)
            elif as_lines:
                print_bytes(b"".join(map(json_line, rows)))
    except KeyboardInterrupt as error:
        if partial is None:
            raise
        message = f"interrupted: {partial}: the same command resumes"
        raise type(error)(message) from None
    except NotFiniteError as error:
        if partial is None:
            raise
        raise NotFiniteError(
            f"{error}: {partial}: the command resumes without that prompt"
        ) from error
    return speed


def _settings(
    model: LanguageModel, tokenizer: Tokenizer | None, options: GenerationOptions
) -> dict[str, Any]:
    """Return the settings on which rows depend, other than prompt and row number."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(split(model)[1]):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(leaf).tobytes())
    words = "bytes"
    if tokenizer is not None:
        words = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    settings = asdict(options) | {"model": digest.hexdigest(), "tokenizer": words}
    del settings["batch_size"]
    return settings


def _key(prompt: Prompt) -> str:
    """Return a hash of a prompt and of its row's further keys."""
    return hashlib.sha256(json.dumps(prompt.row).encode() + prompt.text).hexdigest()


def _encode(prompt: Prompt, tokenizer: Tokenizer | None) -> np.ndarray:
    if tokenizer is not None:
        try:
            prompt.text.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{prompt.name}: {error}: a tokenizer needs UTF-8 text") from error
    tokens = make_encoder(tokenizer)(prompt.text)
    if not len(tokens):
        raise UserError(f"{prompt.name}: the tokenizer returns no token for this prompt")
    return tokens


def _to_row(prompt: Prompt, completion: Completion) -> OutputRow:
    row = prompt.row or {"prompt": prompt.text.decode(errors="replace")}
    new = (completion.text, completion.tokens, completion.finish)
    return row | dict(zip(RESERVED_KEYS, new, strict=True))
