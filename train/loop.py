"""A training run, from its configuration to its report."""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from mc_core import segment_lengths
from train.checkpoint import Checkpoints, Meta, check_same_run, load_run
from train.config import TrainConfig, to_dict
from train.curves import Curves
from train.data import Corpus, load_corpus, make_batches
from train.evaluate import Validate, make_validation, references
from train.optimizer import make_schedule
from train.progress import Progress
from train.report import Report, draw_curves, draw_router, load_report, print_report, save_report
from train.sample import draw_sample
from train.step import TrainState, build, check_finite, split


def train(config: TrainConfig, console: Console) -> Report:
    """Train, or go on from the last checkpoint, and report; a finished run only prints its report.

    Raises:
        UserError: the text, the configuration or the run's directory do not allow it.
        NotFiniteError: training met a NaN or an infinity; the last checkpoint is from before it.
    """
    run, directory = config.run, Path(config.run.directory)
    corpus = load_corpus(config.data, config.model.vocab_size)
    meta = Meta(to_dict(config), corpus.fingerprint, 0.0)
    with Checkpoints(directory, run.keep) as checkpoints:
        saved_step = checkpoints.latest()
        start = saved_step or 0
        if saved_step is not None:
            saved = checkpoints.meta(start)
            check_same_run(directory, saved, meta)
            meta = meta._replace(seconds=saved.seconds)
        if start == run.steps and (report := load_report(directory)):
            print_report(console, directory, report)
            return report

        graphdef, state, step_fn = build(config)
        batches = make_batches(corpus.train, config.data, run)
        validate = make_validation(graphdef, config, corpus)
        schedule = make_schedule(config.optimizer, run.steps)
        if saved_step is not None:
            state = checkpoints.restore(start, state, batches)
            console.print(f"going on from step {start} of {run.steps}: {directory}", soft_wrap=True)

        def due(step: int, every: int) -> bool:
            return bool(every) and (step % every == 0 or step == run.steps)

        directory.mkdir(parents=True, exist_ok=True)
        with Curves(directory, start) as curves, Progress(console, start, config, meta) as progress:
            for step in range(start + 1, run.steps + 1):
                state, metrics = step_fn(state, next(batches))
                check_finite(metrics, step, checkpoints.latest() or 0)
                loss = float(metrics.loss)
                progress.step(step, loss)
                if due(step, run.log_every):
                    curves.write(
                        step,
                        loss=loss,
                        grad_norm=float(metrics.grad_norm),
                        learning_rate=float(schedule(step - 1)),
                        tokens_per_second=progress.row(step, loss),
                        seconds=progress.seconds,
                    )
                if due(step, run.validate_every):
                    bits = validate(state.params, state.rest, run.validate_bytes)
                    curves.write(step, validation_bits_per_byte=bits)
                if due(step, run.save_every):
                    meta = meta._replace(seconds=progress.seconds)
                    checkpoints.save(step, state, batches, meta)

    report = summarize(config, corpus, state, validate, run.steps, meta.seconds)
    if run.sample_tokens:
        model = nnx.merge(graphdef, state.params, state.rest)
        sample = draw_sample(model, config, corpus.validation)
        report = dataclasses.replace(report, sample=sample)
    draw_curves(directory)
    draw_gates(directory, config, corpus, graphdef, state)
    save_report(directory, report)
    print_report(console, directory, report)
    return report


def evaluate(directory: Path, console: Console) -> Report:
    """Score a run's last checkpoint, finished or not, and print the table.

    Raises:
        UserError: there is no checkpoint, it cannot be read, or the text is not the one of the run.
    """
    config, model, step, saved = load_run(directory)
    corpus = load_corpus(config.data, config.model.vocab_size)
    check_same_run(directory, saved, saved._replace(fingerprint=corpus.fingerprint))
    graphdef, params, rest = split(model)
    state = TrainState(params, (), rest)
    validate = make_validation(graphdef, config, corpus)
    report = summarize(config, corpus, state, validate, step, saved.seconds)
    print_report(console, directory, report)
    return report


def summarize(
    config: TrainConfig,
    corpus: Corpus,
    state: TrainState,
    validate: Validate,
    step: int,
    seconds: float,
) -> Report:
    """Score the state after `step` steps on the whole validation text, beside the references."""
    run = config.run
    return Report(
        name=Path(run.directory).name,
        model=config.model.name,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        steps=step,
        tokens=step * run.batch_size * run.accumulation * config.data.window,
        seconds=seconds,
        bits_per_byte=validate(state.params, state.rest, len(corpus.validation)),
        validation_bytes=len(corpus.validation),
        validation_sha256=hashlib.sha256(corpus.validation).hexdigest(),
        documents=corpus.documents,
        references=references(corpus.validation),
    )


def draw_gates(
    directory: Path, config: TrainConfig, corpus: Corpus, graphdef: nnx.GraphDef, state: TrainState
) -> None:
    """Draw `router.png` for the first window of the validation text, if a block has a memory."""
    layer = config.model.layer
    if layer not in config.model.block_layers:
        return
    model = nnx.merge(graphdef, state.params, state.rest)
    tokens = corpus.encode(corpus.validation)[: config.data.window].astype(np.int32)
    _, traces = jax.jit(lambda tokens: model.inspect(tokens))(tokens[None])
    gates = {
        block: np.asarray(trace.gates[0].mean(axis=1))
        for block, trace in enumerate(traces)
        if trace is not None
    }
    draw_router(
        directory, gates, segment_lengths(len(tokens), layer.segmentation, layer.segment_size)
    )
