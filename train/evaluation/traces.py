"""Traces of a model on a text: gates, memories, inner losses and the needle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core import Plan, make_plan
from mc_core.config import MCConfig
from mc_core.errors import UserError
from mc_jax import LanguageModel
from train.checkpoint import load_run
from train.config import TrainConfig, load_config
from train.data.encoded_text import Text, read_text
from train.evaluation.heads import mean_recall
from train.evaluation.needle import Needle, find_needle, weigh_needle

# The fields of a trace that are not None, and `recall` [n, h], without the batch axis.
LayerTrace = dict[str, np.ndarray]
COLUMNS = ("entropy", "cached", "|W|", "|S|", "|ΔW|", "loss before", "after", "recall", "dead")
# Fields of a trace that follow from `segment_lengths`, as no token is masked.
DERIVED = ("token_index", "segment_index", "cached_count", "segment_length")
NEEDLE_COLUMNS = ("weight at the end", "rank", "mean after", "ranked first")


class InspectedModel(NamedTuple):
    """A model with its name in reports.

    Attributes:
        name: name of the run or configuration, and any overrides.
        state: `step N` or `untrained`.
        step: optimizer steps.
        config: configuration of the run.
        model: the model.
    """

    name: str
    state: str
    step: int
    config: TrainConfig
    model: LanguageModel


class Inspection(NamedTuple):
    """Traces of a model on a text."""

    run: str
    state: str  # see `InspectedModel`
    step: int
    config: MCConfig
    text: Text
    plan: Plan  # its segments
    layers: list[LayerTrace]  # of the blocks that have a memory
    needle: Needle | None
    blocks: tuple[int, ...]  # block index of each layer

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each segment."""
        return self.plan.lengths

    @property
    def summary(self) -> str:
        """Description of the run, the text and the segments."""
        count, total, layer = len(self.text.tokens), self.text.total, self.config
        part = f"the first {count:,} of {total:,} tokens" if count < total else f"{count:,} tokens"
        return (
            f"{self.run} ({self.state}, {layer.memory.kind} + {layer.aggregation}): {part} in "
            f"{len(self.lengths)} segments"
        )

    @property
    def rows(self) -> list[list[str]]:
        """Rows of layer, head and the values under the names in `COLUMNS`."""
        return [
            [str(number), str(head), *summarize_head(layer, head)]
            for number, layer in zip(self.blocks, self.layers, strict=True)
            for head in range(layer["gates"].shape[1])
        ]

    @property
    def needle_rows(self) -> list[list[str]]:
        """Gate weights of the needle, sorted by the weight at the last token."""
        if self.needle is None:
            return []
        order = np.argsort(-self.needle.last_weight, axis=None, kind="stable")
        return [needle_row(self.needle, int(place)) for place in order]


def load_trained(directory: Path, overrides: Sequence[str] = ()) -> InspectedModel:
    """Return the model of a run's last checkpoint; `overrides` as in `load_run`.

    Raises:
        UserError: there is no checkpoint, or an override is not allowed.
    """
    config, model, step, _ = load_run(directory, overrides=overrides)
    words = " ".join((directory.resolve().name, *overrides))
    return InspectedModel(words, f"step {step}", step, config, model)


def make_untrained(path: Path, overrides: Sequence[str] = ()) -> InspectedModel:
    """Return the model of a configuration with its initial parameters.

    Args:
        path: YAML file of a run.
        overrides: `key=value`, as for `mc train`.

    Raises:
        UserError: the configuration is invalid.
    """
    config = load_config(path, overrides)
    dtype = jnp.dtype(config.run.dtype)
    model = LanguageModel(config.model, rngs=nnx.Rngs(config.run.seed), dtype=dtype)
    return InspectedModel(" ".join((path.stem, *overrides)), "untrained", 0, config, model)


def trace_text(
    source: InspectedModel, path: Path, tokens: int, needle: str | None = None
) -> Inspection:
    """Run a model on the first tokens of a text, and return its traces.

    Raises:
        UserError: no block has a memory, or the text cannot be used.
    """
    config, model = source.config, source.model
    layer = config.model.layer
    if layer not in config.model.block_layers:
        mixers = list(config.model.mixers)
        raise UserError(f"{source.name}: model.mixers = {mixers}: must have a 'memory' to inspect")
    text = read_text(path, config).first(tokens)
    plan = make_plan(len(text.tokens), layer)
    segment = plan.segment_of
    if needle is not None and plan.has_buckets:
        raise UserError(
            f"--needle: segmentation = {layer.segmentation!r}: must be 'constant' or "
            "'logarithmic', because the segments of a bucket share one gate"
        )
    place = None if needle is None else find_needle(text, needle, segment, layer.aggregation)
    _, traces = jax.jit(lambda tokens: model.inspect(tokens))(text.tokens[None])
    blocks = tuple(block for block, trace in enumerate(traces) if trace is not None)
    layers = [
        _without_batch(traces[block]._asdict() | {"recall": traces[block].recall})
        for block in blocks
    ]
    point = None
    if needle is not None and place is not None:
        gates = np.stack([found["gates"] for found in layers])
        point = weigh_needle(needle, place, gates, segment, layer.aggregation, blocks)
    run = (source.name, source.state, source.step)
    return Inspection(*run, layer, text, plan, layers, point, blocks)


def to_json(found: Inspection) -> dict[str, Any]:
    """Return plain values: the arrays of `LayerTrace` by layer, without `DERIVED`."""
    result: dict[str, Any] = {
        "run": found.run,
        "step": found.step,
        "layer_config": found.config.to_dict(),
        "segment_lengths": list(found.lengths),
        "tokens": found.text.tokens.tolist(),
        "pieces": list(found.text.pieces),
        "blocks": list(found.blocks),
        "layers": [
            {name: _plain(x) for name, x in layer.items() if name not in DERIVED}
            for layer in found.layers
        ],
    }
    if found.needle is not None:
        needle = {**vars(found.needle), "verdict": found.needle.verdict}
        result["needle"] = {
            name: _plain(x) if isinstance(x, np.ndarray) else x
            for name, x in needle.items()
            if name != "blocks"
        }
    return result


def summarize_head(layer: LayerTrace, head: int) -> list[str]:
    """Return the values of a head under the names in `COLUMNS`.

    These are means over tokens (`cached` is the gate weight of cached memories), the mean recall
    over segments except the last one, and `yes` for a dead head.
    """
    gates = layer["gates"][:, head]
    cached = float(np.mean(gates[:, :-1].sum(-1) / gates.sum(-1)))
    names = ("memory_norm", "momentum_norm", "update_norm", "loss_before", "loss_after")
    values = [float(layer[name][:, head].mean()) if name in layer else None for name in names]
    entropy = float(layer["entropy"][:, head].mean())
    (recall,) = mean_recall(layer["recall"][None, :, head : head + 1])
    numbers = ("" if x is None else f"{x:.3g}" for x in (entropy, cached, *values, recall))
    return [*numbers, "yes" if layer["dead_heads"][head] else ""]


def needle_row(needle: Needle, place: int) -> list[str]:
    """Return layer, head and needle weights at a flat index, under `NEEDLE_COLUMNS`."""
    layer, head = np.unravel_index(place, needle.last_weight.shape)
    return [
        str(needle.blocks[layer]),
        str(head),
        f"{needle.last_weight[layer, head]:.3f}",
        f"{needle.last_rank[layer, head]} of {needle.cached}",
        f"{needle.mean_weight[layer, head]:.3f}",
        f"{needle.first_share[layer, head]:.0%}",
    ]


def _without_batch(trace: dict[str, Any]) -> LayerTrace:
    by_token = ("token_index", "segment_index", "cached_count")  # fields without a batch axis
    arrays = {name: np.asarray(x) for name, x in trace.items() if x is not None}
    return {name: x if name in by_token else x[0] for name, x in arrays.items()}


def _plain(x: np.ndarray) -> Any:
    """Return nested lists; non-finite values become None, as JSON does not support them."""
    if x.dtype.kind != "f":
        return x.tolist()
    # Converting through text keeps the short decimal form of a float32.
    short = x if x.dtype == np.float64 else x.astype(str).astype(np.float64)
    finite = np.isfinite(x)
    if not finite.all():
        short = short.astype(object)
        short[~finite] = None
    return short.tolist()
