"""The quick and the full grid of cases of `mc parity check`."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from mc_core import (
    DeltaConfig,
    DLAConfig,
    LinearConfig,
    MCConfig,
    MemoryConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.aggregations import AGGREGATIONS
from mc_core.config import GATES, REMATS, START_MODES, VALUE_NORMS
from mc_core.memories import MEMORIES
from parity.cases import DTYPES, MASKS, METHODS, Case

VOCABULARY = 19


def case(
    memory: MemoryConfig,
    aggregation: str,
    start: str = "checkpoint",
    *,
    level: str = "function",
    d_model: int = 8,
    tokens: int = 13,
    num_layers: int = 1,
    tie_embeddings: bool = True,
    remat: str = "none",
    mixers: tuple[str, ...] = ("memory",),
    mask: str = "none",
    lengths: tuple[int, ...] | None = None,
    splits: tuple[int, ...] | None = None,
    padding: bool = False,
    method: str = "chunked",
    dtype: str = "float64",
    ties: bool = False,
    new_tokens: int = 0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Return a small case; `options` are fields of `MCConfig`."""
    options = {"segment_size": 4, "chunk_size": 3} | options
    layer = MCConfig(d_model, 2, memory, aggregation, state_init_mode=start, **options)
    config: MCConfig | ModelConfig = layer
    if level == "model":
        config = ModelConfig(
            VOCABULARY,
            num_layers,
            layer,
            tie_embeddings=tie_embeddings,
            remat=remat,
            mixers=mixers,
            attention_window=5,
        )
    return Case(
        config,
        level,
        method,
        tokens,
        mask=mask,
        lengths=lengths,
        splits=splits,
        padding=padding,
        dtype=dtype,
        ties=ties,
        new_tokens=new_tokens,
        seed=seed,
    )


_LINEAR, _SWLA = LinearConfig(), SWLAConfig()
_DLA, _TITANS = DLAConfig(expansion=2), TitansConfig(expansion=2)
_TITANS_LAST = TitansConfig(expansion=2, written_layers="last", inner_clip=None, residual=False)

# Buckets of segments: every form of read, and both start modes.
FENWICK = (
    case(
        LinearConfig("elu+1", normalize=True, coefficients="token"),
        "grm",
        "restart",
        segmentation="fenwick",
        tokens=23,
        mask="some",
        gate_bias=0.5,
        pool_norm="l2",
    ),
    case(
        _SWLA,
        "ssc",
        "restart",
        segmentation="fenwick",
        tokens=23,
        mask="padded",
        splits=(6, 1, 16),
        gate="token",
    ),
    case(
        LinearConfig(coefficients="token", learn_initial=True),
        "residual",
        "restart",
        level="layer",
        segmentation="fenwick",
        tokens=19,
        conv_width=3,
        mask="segment",
    ),
    case(_DLA, "soup", segmentation="fenwick", tokens=21, splits=(9, 12), pooling="sum"),
    case(
        _TITANS,
        "grm",
        level="model",
        segmentation="fenwick",
        tokens=19,
        splits=(5, 14),
        padding=True,
    ),
    case(_TITANS, "mean", segmentation="fenwick", tokens=16, method="recurrent", mask="some"),
)

# Every pair of kind and aggregation once; other options are distributed over the pairs.
QUICK = (
    case(_LINEAR, "none", "restart", level="model", num_layers=2, qk_norm="l2"),
    case(LinearConfig(coefficients="head"), "residual", level="layer", conv_width=4, mask="padded"),
    case(LinearConfig("elu+1", normalize=True), "grm", mask="some", softmax_temperature=0.7),
    case(LinearConfig("elu+1"), "soup", "restart", segmentation="logarithmic", pooling="sum"),
    case(_LINEAR, "ssc", ssc_top_k=2, ties=True, tokens=19),
    case(LinearConfig(learn_initial=True), "mean", level="layer", tokens=11, output_norm="none"),
    case(_SWLA, "none", lengths=(5, 1, 7), mask="segment"),
    case(_SWLA, "residual", "restart", mask="row", method="recurrent"),
    case(_SWLA, "grm", "restart", level="layer", segmentation="logarithmic", conv_width=3),
    case(_SWLA, "soup", mask="some", detach_cached_states=True),
    case(
        SWLAConfig(coefficients="head", min_retention=0.5),
        "ssc",
        level="layer",
        use_q_as_u=True,
        gate="token",
        gate_bias=-0.5,
        softmax_temperature="learned",
        mask="padded",
    ),
    case(SWLAConfig(coefficients="constant", previous=0.5), "mean", level="layer", qk_norm="l2"),
    case(
        DLAConfig(expansion=2, retention=0.9, retention_target="initial"),
        "none",
        level="layer",
        mask="some",
        tokens=10,
    ),
    case(DLAConfig(depth=1, residual=False), "residual", "restart", mask="some"),
    case(
        DLAConfig(expansion=1, residual=False, chunk_update="orthogonal"),
        "grm",
        pooling="sum",
        tokens=11,
    ),
    case(DLAConfig(depth=3, expansion=1, objective="l2"), "soup", method="recurrent", mask="some"),
    case(_DLA, "ssc", "restart", mask="padded", detach_cached_context=True),
    case(DLAConfig(expansion=1, norm="layer"), "mean", level="layer", segmentation="logarithmic"),
    case(_TITANS, "none", method="recurrent", mask="segment"),
    # With seed 0, a layer norm has a variance so small that float32 loses two digits.
    case(TitansConfig(expansion=1, norm="layer"), "residual", "restart", tokens=14, seed=1),
    case(_TITANS, "grm", level="model", conv_width=4, tie_embeddings=False, mask="padded"),
    case(TitansConfig(depth=1, inner_clip=None), "soup", "restart", mask="some"),
    case(_TITANS, "ssc", ssc_top_k=1, method="recurrent", tokens=11),
    case(
        TitansConfig(expansion=1, coefficients="head"),
        "mean",
        level="layer",
        chunk_size=5,
        value_norm="rms",
    ),
    case(_LINEAR, "grm", "restart", dtype="float32", mask="some"),
    case(TitansConfig(depth=1), "grm", dtype="float32", tokens=11),
    case(LinearConfig(coefficients="token"), "grm", level="layer", dtype="bfloat16"),
    case(DLAConfig(depth=1), "residual", dtype="bfloat16", mask="some"),
    case(
        LinearConfig("elu+1", normalize=True),
        "grm",
        gate_bias=1.0,
        pool_norm="l2",
        mask="some",
        splits=(2, 1, 10),
    ),
    case(_SWLA, "ssc", "restart", mask="segment", splits=(5, 8), chunk_size=2),
    case(_LINEAR, "mean", "restart", level="layer", conv_width=3, splits=(5, 8), padding=True),
    case(_DLA, "soup", "restart", splits=(6, 5), tokens=11, pooling="sum", gate="token"),
    case(
        TitansConfig(expansion=2, retention_target="initial", chunk_update="orthogonal"),
        "residual",
        level="model",
        conv_width=4,
        splits=(5, 8),
        padding=True,
        value_norm="l2",
    ),
    case(DLAConfig(depth=1), "grm", dtype="bfloat16", splits=(5, 3), tokens=8),
    case(_TITANS, "ssc", level="model", conv_width=4, padding=True, new_tokens=9),
    case(_SWLA, "grm", "restart", level="model", num_layers=2, new_tokens=9),
    case(_LINEAR, "none", level="model", num_layers=2, mixers=("window", "memory"), mask="some"),
    case(
        _LINEAR,
        "none",
        level="model",
        num_layers=2,
        mixers=("attention", "window"),
        conv_width=3,
        splits=(6, 7),
    ),
    case(DeltaConfig(), "none", level="layer", mask="some"),
    case(DeltaConfig(), "residual", "restart", mask="segment", chunk_size=5),
    case(DeltaConfig(), "grm", mask="padded", splits=(5, 8)),
    case(DeltaConfig(coefficients="head", learn_initial=True), "soup", "restart", level="layer"),
    case(DeltaConfig(), "ssc", method="recurrent", tokens=11),
    case(DeltaConfig(coefficients="constant"), "mean", level="layer", dtype="bfloat16"),
    case(_TITANS_LAST, "grm", level="model", conv_width=4, splits=(5, 8), mask="some"),
    case(
        DLAConfig(expansion=2, written_layers="last", inner_clip=None, residual=False),
        "residual",
        level="layer",
    ),
    case(
        _LINEAR,
        "none",
        level="model",
        mixers=("log_linear",),
        conv_width=3,
        chunk_size=4,
        mask="some",
    ),
    case(
        _LINEAR,
        "none",
        level="model",
        mixers=("log_linear",),
        chunk_size=2,
        splits=(6, 1, 6),
        padding=True,
        tie_embeddings=False,
    ),
    case(_LINEAR, "none", level="model", mixers=("log_linear",), qk_norm="none", new_tokens=9),
    case(
        _LINEAR,
        "none",
        level="model",
        mixers=("log_linear",),
        dtype="bfloat16",
        output_norm="none",
    ),
    *FENWICK,
)

_OPTIONS: dict[str, tuple[Any, ...]] = {
    "chunk_size": (1, 3, 5),
    "pooling": ("mean", "sum"),
    "softmax_temperature": (1.0, 0.6),
    "ssc_top_k": (1, 2, 3),
    "use_q_as_u": (False, False, True),
    "qk_norm": (None, "l2"),
    "conv_width": (0, 4),
    "output_norm": ("rms", "rms", "none"),
    "detach_cached_states": (False, False, True),
    "detach_cached_context": (False, False, True),
}


def full() -> Iterator[Case]:
    """Yield the quick grid, and every kind, aggregation, start and segmentation in every dtype.

    The remaining options are drawn at random for each case, with a fixed seed. A third of the cases
    that support streaming use it. Models in float32 and bfloat16 have one block, and memories in
    bfloat16 at most two layers, because rounding errors of deeper ones exceed useful limits; deep
    models use float64. Layer norms in float32 and bfloat16 have width 8: the variance of 4 numbers
    may be so small that float32 loses two digits. Models in float32 and bfloat16 have no output
    norm, unlike layers: the read of a memory with one token is `v (k . q)`, and if `k . q` is near
    zero, the norm amplifies its rounding error.
    """
    yield from QUICK
    # Each has its own sequence, so that the draws of one do not change those of another.
    choices = (random.Random(seed).choice for seed in range(5))
    pick, pick_stream, pick_gate, pick_value_norm, pick_score = choices
    for kind, aggregation, start, segmentation, dtype in product(
        MEMORIES, AGGREGATIONS, START_MODES, ("constant", "logarithmic"), DTYPES
    ):
        options = {name: pick(values) for name, values in _OPTIONS.items()}
        level = pick(("function", "function", "layer", "model"))
        memory: Any = pick(MEMORIES[kind].variants())
        method = pick(METHODS) if level == "function" else "chunked"
        tokens = pick((11, 13, 14, 23))
        streams = segmentation == "constant" and method == "chunked"
        streams = streams and pick_stream((True, False, False))
        first = pick_stream(((5,), (2, 3), (1, 6, 1)))
        num_layers, d_model = pick((1, 2)), 8
        if dtype != "float64":
            num_layers = 1
        if dtype != "float64" and memory.has_layer_norm:
            d_model = 16
        if dtype != "float64" and level == "model":
            options["output_norm"] = "none"
        if dtype == "bfloat16" and hasattr(memory, "depth"):
            memory = dataclasses.replace(memory, depth=min(memory.depth, 2))
        if pick_score((True, False, False)):
            options["softmax_temperature"] = "learned"
        yield case(
            memory,
            aggregation,
            start,
            level=level,
            d_model=d_model,
            method=method,
            tokens=tokens,
            splits=(*first, tokens - sum(first)) if streams else None,
            padding=streams and level != "function" and pick_stream((True, False)),
            num_layers=num_layers,
            tie_embeddings=pick((True, False)),
            remat=pick(REMATS),
            mask=pick(MASKS),
            segmentation=segmentation,
            dtype=dtype,
            seed=pick(range(1000)),
            gate=pick_gate(tuple(GATES)),
            value_norm=pick_value_norm(VALUE_NORMS),
            gate_bias=pick_score((None, None, 0.5)),
            pool_norm=pick_score(("none", "none", "l2")),
            **options,
        )
    yield from _log_linear(random.Random(5).choice)
    yield from _fenwick()


def _log_linear(pick: Callable[[Any], Any]) -> Iterator[Case]:
    """Yield models with log-linear attention, full passes and streams, in every dtype."""
    for dtype, streams, chunk_size in product(DTYPES, (False, True), (1, 4, 16)):
        deep, tokens = dtype == "float64", pick((11, 16, 23))
        first = pick(((5,), (2, 3), (1, 6, 1)))
        yield case(
            LinearConfig(),
            "none",
            level="model",
            num_layers=2 if deep else 1,
            mixers=pick((("log_linear",), ("log_linear", "memory"))) if deep else ("log_linear",),
            tokens=tokens,
            splits=(*first, tokens - sum(first)) if streams else None,
            padding=streams and pick((True, False)),
            tie_embeddings=pick((True, False)),
            remat=pick(REMATS),
            mask=pick(tuple(mask for mask in MASKS if mask != "segment")),
            dtype=dtype,
            seed=pick(range(1000)),
            chunk_size=chunk_size,
            conv_width=pick((0, 4)),
            qk_norm=pick(("l2", "none")) if deep else "l2",
            output_norm="rms" if deep else "none",
        )


def _fenwick() -> Iterator[Case]:
    """Yield every kind, aggregation and allowed start mode with `fenwick`, in every dtype."""
    pick = random.Random(5).choice
    for kind, aggregation, start, dtype in product(MEMORIES, AGGREGATIONS, START_MODES, DTYPES):
        if start == "restart" and not MEMORIES[kind].decay_only_transition:
            continue
        memory: Any = pick(MEMORIES[kind].variants()) if dtype == "float64" else MEMORIES[kind]()
        if dtype != "float64" and hasattr(memory, "depth"):
            memory = dataclasses.replace(memory, depth=1)
        tokens = pick((16, 19, 23))
        first, streams = pick(((5,), (2, 9))), pick((True, False))
        yield case(
            memory,
            aggregation,
            start,
            level="function" if dtype != "float64" else pick(("function", "layer")),
            tokens=tokens,
            splits=(*first, tokens - sum(first)) if streams else None,
            mask=pick(MASKS),
            segmentation="fenwick",
            segment_size=pick((2, 3, 4)),
            chunk_size=pick((1, 3, 5)),
            dtype=dtype,
            seed=pick(range(1000)),
            gate=pick(tuple(GATES)),
            pooling=pick(("mean", "sum")),
            gate_bias=pick((None, None, 0.5)),
        )


GRIDS: dict[str, Callable[[], Iterator[Case]]] = {"quick": lambda: iter(QUICK), "full": full}
