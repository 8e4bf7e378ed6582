"""`mc evaluate` on text: bits per byte of the validation text or of other text, by position."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from mc_core.errors import UserError
from mc_core.files import to_json, write_atomic
from mc_core.tables import ResultTable, counted
from mc_jax import LanguageModel
from parity.environment import command, machine
from train.checkpoint import Meta, check_same_run
from train.config import TextConfig, TrainConfig
from train.data.corpus import encode_joined, load_corpus, round_trip
from train.data.documents import NAMED, read_documents
from train.data.round_trip import RoundTrip
from train.data.separator import Joined, Separator, choose_separator
from train.data.sources import Tokens
from train.data.tokenizer import load_tokenizer, make_encoder
from train.evaluation.heads import TITLE, HeadReport, first_window, measure_heads
from train.evaluation.run_report import TextReport
from train.evaluation.validation import References, make_scorer, references
from train.loop import evaluate as evaluate_validation
from train.step import split


class LoadedRun(NamedTuple):
    """A run's last checkpoint."""

    directory: Path
    config: TrainConfig
    model: LanguageModel
    step: int
    overrides: tuple[str, ...] = ()  # of the configuration; see `load_run`

    @property
    def name(self) -> str:
        """Name of the run, and the overrides."""
        return " ".join((self.directory.resolve().name, *self.overrides))


class EncodedText(NamedTuple):
    """The text of files and folders, encoded for a run."""

    joined: Joined
    tokens: np.ndarray
    documents: int
    separator: Separator
    tokenizer: Tokenizer | None


class ScoredText(NamedTuple):
    """Tokens of the scored text and of the training text."""

    name: str | list[str]  # "validation", or files and folders
    size: int  # bytes
    tokens: np.ndarray
    training: Tokens


@dataclass(frozen=True)
class TextEvaluation:
    """Bits per byte of a text, as plain values.

    Attributes:
        text: `validation`, or the files and folders that were scored.
        model: memory and aggregation.
        parameters: number of parameters of the model.
        window: tokens per window; each window starts with an empty state.
        bits_per_byte: total bits divided by total bytes; separator tokens have bits but no bytes.
        bytes: length of the text in bytes.
        tokens: length of the text in tokens, including separators.
        tokens_per_byte: ratio of the two; 1 for byte-level models.
        documents: number of files, or of distinct documents of the validation text.
        sha256: hash of the text.
        separator: description of the separator between documents.
        round_trip: encoding losses of the tokenizer; None for bytes.
        references: bits per byte of methods without a model.
        unit: "byte", or "token" if the run has a tokenizer.
        positions: bits per token by position in the window; see `by_position`.
        heads: recall and dead heads on the first window; None without a memory.
    """

    text: str | list[str]
    model: str
    parameters: int
    window: int
    bits_per_byte: float
    bytes: int
    tokens: int
    tokens_per_byte: float
    documents: int
    sha256: str
    separator: str
    round_trip: RoundTrip | None
    references: References
    unit: str
    positions: list[dict[str, Any]]
    heads: HeadReport | None = None
    task: str = TextConfig.task
    command: str = field(default_factory=command)
    machine: dict[str, Any] = field(default_factory=machine)


def evaluate_text(
    run: LoadedRun,
    corpus: tuple[str, ...] | None,
    console: Console,
    *,
    json_file: Path | None = None,
    markdown: Path | None = None,
) -> TextEvaluation:
    """Score a text, and print and write the results.

    Args:
        run: loaded run whose model scores the text.
        corpus: files and folders to score; None = the run's validation text.
        console: receives the tables.
        json_file: output file of the numbers.
        markdown: output file of the tables.

    Raises:
        UserError: the text is missing, or is not the validation text of the run.
        OSError: a file cannot be read or written.
    """
    found = _score_validation(run, console) if corpus is None else score_text(run, corpus)
    reports = tables(found, f"{run.name}, step {run.step}: text")
    if corpus is not None:
        for report in reports:
            console.print(report.table())
        for line in (*(found.heads.notes if found.heads else ()), *reports[0].footer()):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_file:
        where = {"run": str(run.directory), "step": run.step, "overrides": run.overrides}
        content = where | to_plain(found)
        write_atomic(json_file, to_json(content, indent=1).encode())
    if markdown:
        write_atomic(markdown, "\n".join(report.as_markdown() for report in reports).encode())
    return found


def score_text(run: LoadedRun, corpus: tuple[str, ...]) -> TextEvaluation:
    """Score the text of files and folders, in order, like the validation text.

    Raises:
        UserError: a file is missing, empty or not text.
        OSError: a file cannot be read.
    """
    config = run.config
    joined, tokens, documents, separator, tokenizer = read_text(config, corpus)
    graphdef, params, rest = split(run.model)
    scored = make_scorer(graphdef, config)(params, rest, tokens, len(joined.text))
    return TextEvaluation(
        text=list(corpus),
        model=config.model.name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        window=config.data.max_tokens,
        bits_per_byte=scored.bits_per_byte,
        bytes=len(joined.text),
        tokens=len(tokens),
        tokens_per_byte=len(tokens) / len(joined.text),
        documents=documents,
        sha256=hashlib.sha256(joined.text).hexdigest(),
        separator=separator.description,
        round_trip=round_trip(joined, tokenizer),
        references=references(joined.text),
        unit="byte" if tokenizer is None else "token",
        positions=scored.positions,
        heads=measure_heads(run.model, first_window(tokens, config)),
    )


def read_text(config: TrainConfig, corpus: tuple[str, ...]) -> EncodedText:
    """Read files and folders of `--corpus`, in order, and encode them like the text of a run.

    Raises:
        UserError: a file is missing, empty or not text.
        OSError: a file cannot be read.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.model.vocab_size)
    given = config.data.separator if isinstance(config.data, TextConfig) else None
    separator = choose_separator(given, tokenizer)
    documents = list(read_documents(corpus, "--corpus"))
    joined = separator.join(documents)
    tokens = encode_joined(joined, separator, make_encoder(tokenizer, "--corpus"))
    return EncodedText(joined, tokens, len(documents), separator, tokenizer)


def read_scored_text(run: LoadedRun, meta: Meta, words: tuple[str, ...] | None) -> ScoredText:
    """Read and encode the scored text and the training text of a text run.

    Args:
        run: loaded run.
        meta: metadata of its checkpoint.
        words: files and folders to score; None = the run's validation text.

    Raises:
        UserError: a file is missing, or the text is not that of the run.
    """
    data = run.config.data
    assert isinstance(data, TextConfig)
    corpus = load_corpus(data, run.config.model.vocab_size)
    check_same_run(
        run.directory, meta, meta._replace(fingerprint=corpus.fingerprint), may_grow=True
    )
    if words is None:
        tokens = corpus.validation_tokens()
        name, size = "validation", len(corpus.validation)
        scored = ScoredText(name, size, tokens, corpus.train)
    else:
        other = read_text(run.config, words)
        scored = ScoredText(list(words), len(other.joined.text), other.tokens, corpus.train)
    if len(scored.tokens) < 2:
        raise UserError("the text to score: needs at least 2 tokens")
    return scored


def _score_validation(run: LoadedRun, console: Console) -> TextEvaluation:
    """Score the run's validation text, and print the report of the run."""
    data = run.config.data
    if not isinstance(data, TextConfig):
        raise UserError(
            f"{run.directory}: --task text: a run on data.task = {data.task!r} has no validation "
            "text: give a text with --corpus"
        )
    for word in data.corpus_paths:
        if word not in NAMED and not Path(word).exists():
            raise UserError(
                f"{run.directory}: data.corpus = {word}: no such file or folder, so there is no "
                "validation text: restore it, or give another text with --corpus"
            )
    report: TextReport = evaluate_validation(run.directory, console, run.overrides)
    assert report.validation_tokens is not None
    assert report.separator is not None
    return TextEvaluation(
        text="validation",
        model=report.model,
        parameters=report.parameters,
        window=data.max_tokens,
        bits_per_byte=report.bits_per_byte,
        bytes=report.validation_bytes,
        tokens=report.validation_tokens,
        tokens_per_byte=report.validation_tokens / report.validation_bytes,
        documents=report.documents[1],
        sha256=report.validation_sha256,
        separator=report.separator,
        round_trip=report.round_trip,
        references=report.references,
        unit=report.unit,
        positions=report.positions,
        heads=report.heads,
    )


def to_plain(found: TextEvaluation) -> dict[str, Any]:
    """Convert to plain values, and named tuples to dictionaries."""
    plain = dataclasses.asdict(found)
    for name in ("references", "round_trip"):
        part = getattr(found, name)
        plain[name] = part and part._asdict()
    return plain


def tables(found: TextEvaluation, title: str) -> list[ResultTable]:
    """Return the bits per byte of model and references, the bits by position, and the recall."""
    texts = found.text if isinstance(found.text, str) else ", ".join(found.text)
    several = found.documents > 1
    notes = [
        f"text: {texts}; {counted(found.documents, 'document')}, {found.bytes:,} bytes, "
        f"SHA-256 {found.sha256[:12]}",
        *([f"between documents: {found.separator}"] if several else []),
        f"{found.tokens:,} tokens, {found.tokens_per_byte:.3g} per byte; windows of "
        f"{found.window:,} tokens; {found.parameters:,} parameters",
        "order-0 (entropy of the byte frequencies) and xz -9 use only these bytes",
    ]
    if found.round_trip is not None and found.round_trip.warning:
        notes.append(found.round_trip.warning)
    named = [(found.model, found.bits_per_byte)]
    named += zip(("uniform", "order-0", "xz -9"), found.references, strict=True)
    rows = [
        {
            "what": name,
            "bits/byte": f"{bits:.4f}",
            "difference": f"{bits - found.bits_per_byte:+.4f}",
        }
        for name, bits in sorted(named, key=lambda item: item[1])
    ]
    by_position = [
        {
            "position": f"{bucket['start']} to {bucket['end'] - 1}",
            f"bits/{found.unit}": f"{bucket['bits']:.4f}",
            f"{found.unit}s": bucket["tokens"],
        }
        for bucket in found.positions
    ]
    note = f"a {found.unit} at position i of its window is predicted from i + 1 {found.unit}s"
    reports = [ResultTable(title, rows, notes, found.machine, found.command)]
    if by_position:
        name = f"{title}, by position in the window"
        reports.append(ResultTable(name, by_position, [note], found.machine, found.command))
    if found.heads:
        name = f"{title}, {TITLE}"
        rows, notes = found.heads.rows, found.heads.notes
        reports.append(ResultTable(name, rows, notes, found.machine, found.command))
    return reports
