"""The text task: windows, bits per byte, a sample, and the gates and recall of its memories."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np
from flax import nnx

from mc_core import make_plan
from mc_core.installation import source_commit
from train.config import TextConfig, TrainConfig
from train.data.corpus import Corpus, load_corpus
from train.data.tokenizer_copy import prefer_copy
from train.data.windows import make_batches
from train.evaluation.heads import HeadReport, first_window, measure_heads, summarize_heads
from train.evaluation.run_report import (
    TextReport,
    data_notes,
    draw_curves,
    draw_router,
    load_report,
    print_report,
    save_report,
)
from train.evaluation.sample import draw_sample
from train.evaluation.validation import make_validation, references
from train.step import TrainState, merge


class TextTask:
    """Next-token prediction; see `Task`."""

    load_report = staticmethod(load_report)
    print_report = staticmethod(print_report)

    def __init__(self, config: TrainConfig):
        assert isinstance(config.data, TextConfig)
        self._config = config
        self._data = config.data
        self._corpus = load_corpus(config.data, config.model.vocab_size)
        self.fingerprint = self._corpus.fingerprint

    @property
    def notes(self) -> list[str]:
        """Notes on the separator and the tokenizer's losses."""
        corpus = self._corpus
        return data_notes(corpus.separator.description, corpus.documents, corpus.round_trip)

    def batches(self, own: Sequence[int] | None = None) -> grain.DatasetIterator:
        """Iterate over windows."""
        corpus = self._corpus
        return make_batches(corpus.train, self._data, self._config.run, own, corpus.parts)

    def scoring(self, graphdef: nnx.GraphDef) -> "TextScoring":
        """Return the scoring of the validation text."""
        return TextScoring(self._config, self._corpus, graphdef)


class TextScoring:
    """Scores a state on the validation text; see `Scoring`."""

    def __init__(self, config: TrainConfig, corpus: Corpus, graphdef: nnx.GraphDef):
        self._config = config
        self._corpus = corpus
        self._graphdef = graphdef
        self._validate = make_validation(graphdef, config, corpus)

    def row(self, state: TrainState) -> dict[str, float]:
        """Return the bits per byte of the first `run.validate_bytes` of the text."""
        found = self._validate(state.params, state.rest, self._config.run.validate_bytes)
        return {"validation_bits_per_byte": found.bits_per_byte}

    def report(self, state: TrainState, step: int, seconds: float) -> TextReport:
        """Score the whole validation text and the reference methods."""
        config, corpus = self._config, self._corpus
        run = config.run
        found = self._validate(state.params, state.rest, len(corpus.validation))
        return TextReport(
            name=Path(run.directory).name,
            model=config.model.name,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            steps=step,
            tokens=step * run.batch_size * run.accumulation * int(config.data.mean_tokens),
            seconds=seconds,
            bits_per_byte=found.bits_per_byte,
            validation_bytes=len(corpus.validation),
            validation_sha256=hashlib.sha256(corpus.validation).hexdigest(),
            documents=corpus.documents,
            references=references(corpus.validation),
            unit="byte" if config.tokenizer == "bytes" else "token",
            positions=found.positions,
            separator=corpus.separator.description,
            validation_tokens=found.num_tokens,
            round_trip=corpus.round_trip,
            commit=source_commit(),
        )

    def with_heads(self, state: TrainState, report: TextReport) -> TextReport:
        """Add recall and dead heads on the first validation window to the report."""
        model = merge(self._graphdef, state.params, state.rest)
        tokens = first_window(self._corpus.validation_tokens(), self._config)
        return dataclasses.replace(report, heads=measure_heads(model, tokens))

    def finish(self, directory: Path, state: TrainState, report: TextReport) -> TextReport:
        """Add a sample to the report, and write report and plots."""
        config = self._config
        if config.run.sample_tokens:
            model = merge(self._graphdef, state.params, state.rest)
            # The file that `data.tokenizer` names may have changed since the run began.
            kept = prefer_copy(config, directory)
            sample = draw_sample(model, kept, self._corpus.validation)
            report = dataclasses.replace(report, sample=sample)
        draw_curves(directory)
        heads = draw_gates(directory, config, self._corpus, self._graphdef, state)
        report = dataclasses.replace(report, heads=heads)
        save_report(directory, report)
        return report


def draw_gates(
    directory: Path, config: TrainConfig, corpus: Corpus, graphdef: nnx.GraphDef, state: TrainState
) -> HeadReport | None:
    """Plot the gates of the first validation window as `router.png`, if a block has a memory.

    Returns:
        recall and dead heads on this window; None without a memory.
    """
    layer = config.model.layer
    if layer not in config.model.block_layers:
        return None
    model = merge(graphdef, state.params, state.rest)
    tokens = first_window(corpus.validation_tokens(), config)
    _, traces = jax.jit(lambda tokens: model.inspect(tokens))(tokens)
    gates = {
        block: np.asarray(trace.gates[0].mean(axis=1))
        for block, trace in enumerate(traces)
        if trace is not None
    }
    draw_router(directory, gates, make_plan(tokens.shape[1], layer))
    return summarize_heads(traces)
