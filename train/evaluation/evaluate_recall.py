"""`mc evaluate --recall`: bits of a text by recurrence of n-grams, for one or several runs."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from mc_core.errors import UserError
from mc_core.files import to_bytes, to_json, write_atomic
from parity.environment import command, machine
from train.checkpoint import Meta, load_run
from train.config import TextConfig
from train.evaluation.bootstrap import SAMPLES, Interval, Resampling
from train.evaluation.evaluate_text import LoadedRun, ScoredText, read_scored_text
from train.evaluation.options import EvaluationOptions, refuse_options
from train.evaluation.recall_plots import draw_slices
from train.evaluation.recall_slices import (
    Slice,
    count_hits,
    find_recurrences,
    make_slices,
    max_ngram,
)
from train.evaluation.recall_tables import tables
from train.evaluation.validation import make_token_scorer
from train.step import split

# Tokens per n-gram, by unit. Bigrams are those of Zoology. A subword of source code has 3 to 4
# bytes, so the context of a byte, 4 bytes, is about as long as that of a subword. Contexts of 1 or
# 2 bytes recur by chance: of the held-out bytes of the standard library, in windows of 512, 66%
# complete a pair that occurred before, and 36% complete 5 bytes that did.
NGRAM = {"byte": 5, "token": 2}
OPTIONS = ("task", "corpus", "seed")
FOLDER = "recall"


@dataclass(frozen=True)
class RecallOptions:
    """Options of `mc evaluate --recall`; None = default.

    Attributes:
        ngram: tokens per n-gram; default: `NGRAM`.
        window: predicted tokens per window; default: that of the runs.
        out: output folder; default: `recall` in the first run's directory.
        json: output file of the numbers; default: `recall.json` in `out`.
        markdown: output file of the tables; default: `recall.md` in `out`.
        plot: output file of the plot; default: `recall.png` in `out`.
    """

    ngram: int | None = None
    window: int | None = None
    out: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class RecallReport:
    """Bits per token of the slices of a text, as plain values.

    Attributes:
        text: `validation`, or the files and folders that were scored.
        bytes: length of the text in bytes.
        tokens: number of predicted tokens; all tokens of the text but the first.
        sha256: hash of the tokens.
        unit: "byte", or "token" if the runs have a tokenizer.
        ngram: tokens per n-gram.
        window: predicted tokens per window.
        windows: number of windows.
        training_tokens: number of training tokens of the first run, in which n-grams are counted.
        seed: random seed of the bootstrap.
        samples: number of bootstrap samples.
        runs: name, directory, step, model, number of parameters and `slices` of each run; see
            `slice_row`.
    """

    text: str | list[str]
    bytes: int
    tokens: int
    sha256: str
    unit: str
    ngram: int
    window: int
    windows: int
    training_tokens: int
    seed: int
    runs: list[dict[str, Any]]
    samples: int = SAMPLES
    command: str = field(default_factory=command)
    machine: dict[str, Any] = field(default_factory=machine)


def evaluate_recall(
    directories: Sequence[Path],
    options: EvaluationOptions,
    recall: RecallOptions,
    console: Console,
    overrides: Sequence[str] = (),
    *,
    mesh: Mesh | None = None,
) -> RecallReport:
    """Score recall slices with the last checkpoints of runs, and print and write the results.

    All runs score the same tokens in the same windows. Slices and counts are those of the first
    run's text, and the other runs are compared with the first one.

    Args:
        directories: run directories.
        options: the text and the seed of the bootstrap.
        recall: slices and outputs.
        console: receives the tables.
        overrides: changes of the configurations of all runs; see `load_run`.
        mesh: devices over which the models and their batches are sharded; None = one device.

    Raises:
        UserError: there is no checkpoint, an option is not supported, or the runs differ in text,
            tokenizer or window.
        OSError: a file cannot be read or written.
    """
    refuse_options(options, OPTIONS, "not supported by --recall")
    if options.task not in (None, TextConfig.task):
        raise UserError(f"--task {options.task}: not supported by --recall: use text")
    loaded = [load_run(directory, overrides=overrides, mesh=mesh) for directory in directories]
    runs = [
        LoadedRun(path, *one[:3], tuple(overrides))
        for path, one in zip(directories, loaded, strict=True)
    ]
    metas = [one[3] for one in loaded]
    window = recall.window or _common_window(runs)
    _check_comparable(runs, metas, options.corpus)
    unit = "byte" if runs[0].config.tokenizer == "bytes" else "token"
    ngram = recall.ngram or NGRAM[unit]
    vocab_size = runs[0].config.model.vocab_size
    if ngram > (largest := max_ngram(vocab_size)):
        raise UserError(f"--ngram = {ngram}: must be <= {largest} for a vocabulary of {vocab_size}")
    text = read_scored_text(runs[0], metas[0], options.corpus)
    found = find_recurrences(text.tokens, ngram, window, vocab_size)
    counts = count_hits(text.tokens, found, text.training, ngram, vocab_size)
    report = RecallReport(
        text=text.name,
        bytes=text.size,
        tokens=len(text.tokens) - 1,
        sha256=hashlib.sha256(text.tokens.astype("<i4").tobytes()).hexdigest(),
        unit=unit,
        ngram=ngram,
        window=window,
        windows=-(-(len(text.tokens) - 1) // window),
        training_tokens=len(text.training),
        seed=options.seed,
        runs=_score(runs, text, make_slices(found, counts), window, options.seed),
    )
    _show(report, recall, directories[0], console)
    return report


def _common_window(runs: Sequence[LoadedRun]) -> int:
    """Return the window of the runs.

    Raises:
        UserError: a run has no training text, or the windows differ.
    """
    for run in runs:
        if not isinstance(run.config.data, TextConfig):
            raise UserError(
                f"{run.directory}: --recall: a run on data.task = {run.config.data.task!r} has no "
                "training text: use runs on data.task = text"
            )
    first, *others = (run.config.data.max_tokens for run in runs)
    for run, window in zip(runs[1:], others, strict=True):
        if window != first:
            raise UserError(
                f"data.window = {first} in {runs[0].directory} and {window} in {run.directory}: "
                "set --window, to score both with the same windows"
            )
    return first


def _check_comparable(
    runs: Sequence[LoadedRun], metas: Sequence[Meta], corpus: tuple[str, ...] | None
) -> None:
    """Check that all runs score the same tokens.

    Raises:
        UserError: the runs differ in tokenizer, separator or validation text.
    """

    def facts(run: LoadedRun, meta: Meta) -> dict[str, Any]:
        data = run.config.data
        assert isinstance(data, TextConfig)
        # A fingerprint is the hashes of the training tokens and of the validation text.
        validation = meta.fingerprint.partition("-")[2] if corpus is None else None
        return {
            "data.tokenizer": meta.tokenizer,
            "data.separator": data.separator,
            "the validation text": validation,
        }

    expected = facts(runs[0], metas[0])
    for run, meta in zip(runs[1:], metas[1:], strict=True):
        for name, value in facts(run, meta).items():
            if value != expected[name]:
                raise UserError(
                    f"{run.directory}: {name} differs from that of {runs[0].directory}: --recall "
                    "compares runs on the same tokens"
                )


def _score(
    runs: Sequence[LoadedRun], text: ScoredText, slices: Sequence[Slice], window: int, seed: int
) -> list[dict[str, Any]]:
    """Return the description and the slices of each run, as plain values."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [" ".join((str(run.directory), *run.overrides)) for run in runs]
    window_of = np.arange(len(text.tokens) - 1) // window
    resampling = Resampling(int(window_of[-1]) + 1, seed)
    first: np.ndarray | None = None
    scored = []
    for run, name in zip(runs, names, strict=True):
        graphdef, params, rest = split(run.model)
        bits = make_token_scorer(graphdef, run.config, window)(params, rest, text.tokens)
        scored.append(
            {
                "name": name,
                "run": str(run.directory),
                "step": run.step,
                "model": run.config.model.name,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "slices": [
                    slice_row(one, bits, first, window_of, resampling, text.size) for one in slices
                ],
            }
        )
        first = bits if first is None else first
    return scored


def slice_row(
    one: Slice,
    bits: np.ndarray,
    first: np.ndarray | None,
    window_of: np.ndarray,
    resampling: Resampling,
    size: int,
) -> dict[str, Any]:
    """Return the numbers of a slice, as plain values.

    Args:
        one: the slice.
        bits: float64 [t], bits of each predicted token.
        first: bits of the same tokens under the first run; None for the first run itself.
        window_of: int [t], window of each token.
        resampling: bootstrap over these windows.
        size: bytes of the text.

    Returns:
        group, name, low and high of the slice; number of `tokens` and their `share` of all tokens;
        `bits` per token with `bits_interval`; `contribution`, bits of the slice divided by the
        bytes of the whole text; `difference` of the bits per token to the first run with
        `difference_interval`.
    """
    windows = int(window_of[-1]) + 1
    chosen = window_of[one.members]
    counts = np.bincount(chosen, minlength=windows)

    def mean(values: np.ndarray) -> Interval:
        return resampling.mean(np.bincount(chosen, values[one.members], windows), counts)

    own = mean(bits)
    compared = Interval(None, None, None) if first is None else mean(bits - first)
    return {
        "group": one.group,
        "name": one.name,
        "low": one.low,
        "high": one.high,
        "tokens": len(chosen),
        "share": len(chosen) / len(bits),
        "bits": own.mean,
        "bits_interval": own[1:],
        "contribution": float(bits[one.members].sum()) / size,
        "difference": compared.mean,
        "difference_interval": compared[1:],
    }


def _show(report: RecallReport, recall: RecallOptions, first: Path, console: Console) -> None:
    """Print the tables, and write the files."""
    reports = tables(report)
    for one in reports:
        console.print(one.table())
    for line in reports[0].footer():
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    folder = first / FOLDER if recall.out is None else recall.out
    if None in (recall.json, recall.markdown, recall.plot):
        folder.mkdir(parents=True, exist_ok=True)
    files = {
        recall.json or folder / "recall.json": to_json(
            dataclasses.asdict(report), indent=1
        ).encode(),
        recall.markdown or folder / "recall.md": to_bytes(
            "\n".join(one.as_markdown() for one in reports)
        ),
        recall.plot or folder / "recall.png": draw_slices(report.runs, report.unit),
    }
    for path, content in files.items():
        write_atomic(path, content)
    console.print(f"numbers, tables and plot: {', '.join(map(str, files))}", soft_wrap=True)
