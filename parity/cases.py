"""What is compared: cases as data, the two grids, and the random inputs of a case."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mc_core import (
    DLAConfig,
    LinearConfig,
    MCConfig,
    MemoryConfig,
    ModelConfig,
    SWLAConfig,
    TitansConfig,
)
from mc_core.config import AGGREGATIONS, START_MODES

Array = np.ndarray

LEVELS = ("function", "layer", "model")
METHODS = ("chunked", "recurrent")
MASKS = ("none", "some", "padded", "segment", "row")
DTYPES = ("float64", "float32", "bfloat16")
VOCABULARY = 19


@dataclass(frozen=True)
class Case:
    """One program that both frameworks run on the same numbers.

    Attributes:
        config: of the layer, or of the model under `level="model"`.
        level: `function` (`memory_caching`), `layer` or `model`.
        method: of the function; layers and models run `chunked`.
        tokens: length of the sequences.
        batch: number of sequences.
        mask: one of `MASKS`.
        lengths: explicit segment lengths, for the function.
        splits: tokens of the calls that together stream the sequence; None = one whole pass.
        padding: rows of a layer's or model's stream lack some places altogether.
        dtype: float64, float32, or bfloat16 compute over float32 parameters.
        ties: all segments have the same keys, so that the router's scores are equal.
        drawn: the parameters are drawn for the comparison, else they are the model's own.
        new_tokens: a model goes on with the tokens for so many, greedily; 0 = it does not.
        seed: of inputs, parameters and cotangents.
    """

    config: MCConfig | ModelConfig
    level: str = "function"
    method: str = "chunked"
    tokens: int = 13
    batch: int = 2
    mask: str = "none"
    lengths: tuple[int, ...] | None = None
    splits: tuple[int, ...] | None = None
    padding: bool = False
    dtype: str = "float64"
    ties: bool = False
    drawn: bool = True
    new_tokens: int = 0
    seed: int = 0

    @property
    def layer(self) -> MCConfig:
        """The configuration of the memory layer."""
        return self.config.layer if isinstance(self.config, ModelConfig) else self.config

    @property
    def name(self) -> str:
        """What the case is: the kind and the aggregation, then all that is not the default."""
        layer = self.layer
        words = [f"{layer.memory.kind}+{layer.aggregation}"]
        words.append(self.method if self.level == "function" else self.level)
        words += [f"greedy={self.new_tokens}"] * (self.new_tokens > 0)
        words += [layer.state_init_mode] * (layer.state_init_mode == "restart")
        cut = "explicit" if self.lengths else layer.segmentation
        words += [cut] * (cut != "constant") + ["ties"] * self.ties
        words += ["+".join(map(str, self.splits))] if self.splits else []
        words += ["padding"] * self.padding
        words += [f"mask={self.mask}"] * (self.mask != "none")
        words += _unusual(layer.memory) + _unusual(layer, _NAMED_FIELDS)
        if isinstance(self.config, ModelConfig):
            words += _unusual(self.config, ("vocab_size", "layer", "ffn_width"))
        return " ".join((*words, f"t={self.tokens}"))

    @property
    def calls(self) -> tuple[slice, ...]:
        """The tokens of each call of a stream."""
        ends = tuple(accumulate(self.splits or ()))
        return tuple(slice(*call) for call in pairwise((0, *ends)))

    def where(self, **fields: Any) -> "Case":
        """Change fields of the case."""
        return dataclasses.replace(self, **fields)


# Fields of a layer that have their own word in a case's name, or are the same all over a grid.
_NAMED_FIELDS = (
    "d_model",
    "num_heads",
    "memory",
    "aggregation",
    "segmentation",
    "segment_size",
    "chunk_size",
    "state_init_mode",
)


def _unusual(config: Any, known: tuple[str, ...] = ()) -> list[str]:
    """Return `field=value` for the fields that are not at their default."""
    return [
        f"{field.name}={value}"
        for field in dataclasses.fields(config)
        if field.name not in known and (value := getattr(config, field.name)) != field.default
    ]


class FunctionInputs(NamedTuple):
    """The differentiable inputs of `memory_caching`."""

    q: Any  # [b, t, h, k], as k and u
    k: Any
    v: Any  # [b, t, h, v]
    u: Any
    initial: tuple[Any, ...]  # each [h, out, in]
    coefficients: dict[str, Any]  # each [b, t, h]
    norm: tuple[Any, Any] | None  # each [h, v]

    def at(self, tokens: slice) -> "FunctionInputs":
        """Take some of the tokens."""
        q, k, v, u = (None if x is None else x[:, tokens] for x in self[:4])
        coefficients = {name: x[:, tokens] for name, x in self.coefficients.items()}
        return self._replace(q=q, k=k, v=v, u=u, coefficients=coefficients)


class Inputs(NamedTuple):
    """The numbers of a case, float64."""

    differentiable: FunctionInputs | dict[str, Array]
    tokens: Array | None  # ids [b, t] of a model
    mask: Array | None  # bool [b, t]
    padding: Array | None = None  # bool [b, t], True where a row has no token

    @property
    def prompts(self) -> list[Array]:
        """The ids of each row, without those at padding."""
        assert self.tokens is not None
        padding = np.zeros(self.tokens.shape, bool) if self.padding is None else self.padding
        return [row[~absent] for row, absent in zip(self.tokens, padding, strict=True)]


def draw(case: Case) -> Inputs:
    """Draw the inputs of a case, of the magnitudes that a trained layer meets.

    They are exact in the case's dtype, so that a float64 run may be fed with the same numbers.
    """
    rng = np.random.default_rng(case.seed)
    mask = _mask(case, rng)
    shape = (case.batch, case.tokens)
    padding = np.random.default_rng([case.seed, 2]).random(shape) < 0.3 if case.padding else None
    if isinstance(case.config, ModelConfig):
        return Inputs({}, rng.integers(case.config.vocab_size, size=shape), mask, padding)
    if case.level == "layer":
        x = rounded(rng.standard_normal((*shape, case.config.d_model)), case.dtype)
        return Inputs({"x": x}, None, mask, padding)
    return Inputs(_function_inputs(case, case.config, rng), None, mask)


def rounded(x: Any, dtype: str) -> Any:
    """Round the arrays of nested tuples and dictionaries to a dtype, and return them as float64."""
    if isinstance(x, dict):
        return {name: rounded(value, dtype) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(rounded(value, dtype) for value in x)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    return None if x is None else x.astype(kind).astype(np.float64)


def state_dtype(dtype: str) -> str:
    """Return the dtype of parameters, coefficients and memories under a compute dtype."""
    return "float64" if dtype == "float64" else "float32"


def _function_inputs(case: Case, config: MCConfig, rng: np.random.Generator) -> FunctionInputs:
    memory, h, width = config.memory, config.num_heads, config.head_dim
    shape = (case.batch, case.tokens, h)
    q, k, u = rng.standard_normal((3, *shape, width))
    if case.ties:
        part = k[:, : config.segment_size]
        k = np.concatenate([part] * (case.tokens // config.segment_size + 1), 1)[:, : case.tokens]
    if config.normalizes_qk:
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    mlp = memory if isinstance(memory, DLAConfig | TitansConfig) else None
    adds_input = mlp and (mlp.residual or mlp.norm == "layer")
    values = width if adds_input else width - 1
    hidden = [width * mlp.expansion] * (mlp.depth - 1) if mlp else []
    dims = [width, *hidden, values]
    initial = tuple(
        rng.standard_normal((h, out, into)) / np.sqrt(into) for into, out in pairwise(dims)
    )
    coefficients = {
        "step": rng.uniform(0.05, 0.3 if mlp else 1.0, shape),
        "retention": rng.uniform(0.7, 1.0, shape),
    }
    if memory.kind == "titans":
        coefficients["momentum"] = rng.uniform(0.2, 0.9, shape)
    if memory.kind == "swla":
        coefficients["previous"] = rng.uniform(-1.0, 1.0, shape)
    v = rng.standard_normal((*shape, values))
    gain_and_bias = rng.uniform(0.5, 1.5, (2, h, values))
    norm = (gain_and_bias[0], gain_and_bias[1]) if mlp and mlp.norm == "layer" else None
    needs_u = config.gated and not config.use_q_as_u
    return FunctionInputs(
        *rounded((q, k, v, u if needs_u else None), case.dtype),
        *rounded((initial, coefficients, norm), state_dtype(case.dtype)),
    )


def _mask(case: Case, rng: np.random.Generator) -> Array | None:
    if case.mask == "none":
        return None
    mask = rng.random((case.batch, case.tokens)) < 0.7
    if case.mask == "padded":
        mask = np.arange(case.tokens) < rng.integers(1, case.tokens + 1, (case.batch, 1))
    elif case.mask == "segment":
        size = case.layer.segment_size
        mask[0, size : 2 * size] = False
    elif case.mask == "row":
        mask[-1] = False
    return mask


def case(
    memory: MemoryConfig,
    aggregation: str,
    start: str = "checkpoint",
    *,
    level: str = "function",
    tokens: int = 13,
    num_layers: int = 1,
    tie_embeddings: bool = True,
    remat: bool = False,
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
    """Build a small case; `options` are fields of `MCConfig`."""
    options = {"segment_size": 4, "chunk_size": 3} | options
    layer = MCConfig(8, 2, memory, aggregation, state_init_mode=start, **options)
    config: MCConfig | ModelConfig = layer
    if level == "model":
        config = ModelConfig(
            VOCABULARY, num_layers, layer, tie_embeddings=tie_embeddings, remat=remat
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

# Each kind with each aggregation once; the other choices are spread over these pairs.
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
    case(SWLAConfig(coefficients="head"), "ssc", level="layer", use_q_as_u=True, mask="padded"),
    case(SWLAConfig(coefficients="constant", previous=0.5), "mean", level="layer", qk_norm="l2"),
    case(_DLA, "none", level="layer", mask="some", tokens=10),
    case(DLAConfig(depth=1, residual=False), "residual", "restart", mask="some"),
    case(DLAConfig(expansion=1, residual=False), "grm", pooling="sum", tokens=11),
    case(DLAConfig(depth=3, expansion=1, objective="l2"), "soup", method="recurrent", mask="some"),
    case(_DLA, "ssc", "restart", mask="padded", detach_cached_context=True),
    case(DLAConfig(expansion=1, norm="layer"), "mean", level="layer", segmentation="logarithmic"),
    case(_TITANS, "none", method="recurrent", mask="segment"),
    # Under seed 0 a layer norm meets so small a variance that float32 loses two digits anywhere.
    case(TitansConfig(expansion=1, norm="layer"), "residual", "restart", tokens=14, seed=1),
    case(_TITANS, "grm", level="model", conv_width=4, tie_embeddings=False, mask="padded"),
    case(TitansConfig(depth=1, inner_clip=None), "soup", "restart", mask="some"),
    case(_TITANS, "ssc", ssc_top_k=1, method="recurrent", tokens=11),
    case(TitansConfig(expansion=1, coefficients="head"), "mean", level="layer", chunk_size=5),
    case(_LINEAR, "grm", "restart", dtype="float32", mask="some"),
    case(TitansConfig(depth=1), "grm", dtype="float32", tokens=11),
    case(LinearConfig(coefficients="token"), "grm", level="layer", dtype="bfloat16"),
    case(DLAConfig(depth=1), "residual", dtype="bfloat16", mask="some"),
    case(LinearConfig("elu+1", normalize=True), "grm", mask="some", splits=(2, 1, 10)),
    case(_SWLA, "ssc", "restart", mask="segment", splits=(5, 3, 5), chunk_size=2),
    case(_LINEAR, "mean", "restart", level="layer", conv_width=3, splits=(5, 8), padding=True),
    case(_DLA, "soup", "restart", splits=(6, 1, 4), tokens=11, pooling="sum"),
    case(_TITANS, "residual", level="model", conv_width=4, splits=(5, 1, 7), padding=True),
    case(DLAConfig(depth=1), "grm", dtype="bfloat16", splits=(7, 4), tokens=11),
    case(_TITANS, "ssc", level="model", conv_width=4, padding=True, new_tokens=9),
    case(_SWLA, "grm", "restart", level="model", num_layers=2, new_tokens=9),
)

_VARIANTS: dict[str, tuple[MemoryConfig, ...]] = {
    "linear": (
        LinearConfig(),
        LinearConfig("elu+1"),
        LinearConfig("elu+1", normalize=True, coefficients="token", retention=0.9),
        LinearConfig(coefficients="head", learn_initial=True),
    ),
    "swla": (
        SWLAConfig(),
        SWLAConfig(coefficients="head", learn_initial=True),
        SWLAConfig(coefficients="constant", retention=0.9, previous=-0.3),
    ),
    "dla": (
        DLAConfig(expansion=2),
        DLAConfig(depth=1, residual=False, coefficients="head"),
        DLAConfig(depth=3, expansion=1, objective="l2", residual=False),
        DLAConfig(expansion=1, norm="layer", inner_clip=0.5, coefficients="constant"),
    ),
    "titans": (
        TitansConfig(expansion=2),
        TitansConfig(depth=1, inner_clip=None, coefficients="constant"),
        TitansConfig(expansion=1, norm="layer", inner_clip=0.5, coefficients="head"),
        TitansConfig(depth=3, expansion=1, objective="dot"),
    ),
}
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

    The remaining choices are drawn anew for each, from a fixed seed. A third of what can stream
    does. Models in float32 and bfloat16 have one block, memories in bfloat16 at most two layers:
    through more a rounding grows past what a limit can tell from a fault; float64 holds the deep
    ones.
    """
    yield from QUICK
    pick, pick_stream = random.Random(0).choice, random.Random(1).choice
    for kind, aggregation, start, segmentation, dtype in product(
        _VARIANTS, AGGREGATIONS, START_MODES, ("constant", "logarithmic"), DTYPES
    ):
        options = {name: pick(values) for name, values in _OPTIONS.items()}
        level = pick(("function", "function", "layer", "model"))
        memory = pick(_VARIANTS[kind])
        method = pick(METHODS) if level == "function" else "chunked"
        tokens = pick((11, 13, 14, 23))
        streams = segmentation == "constant" and method == "chunked"
        streams = streams and pick_stream((True, False, False))
        first = pick_stream(((5,), (2, 3), (1, 6, 1)))
        num_layers = pick((1, 2))
        if dtype != "float64":
            num_layers = 1
        if isinstance(memory, DLAConfig | TitansConfig) and dtype == "bfloat16":
            memory = dataclasses.replace(memory, depth=min(memory.depth, 2))
        yield case(
            memory,
            aggregation,
            start,
            level=level,
            method=method,
            tokens=tokens,
            splits=(*first, tokens - sum(first)) if streams else None,
            padding=streams and level != "function" and pick_stream((True, False)),
            num_layers=num_layers,
            tie_embeddings=pick((True, False)),
            remat=pick((True, False)),
            mask=pick(MASKS),
            segmentation=segmentation,
            dtype=dtype,
            seed=pick(range(1000)),
            **options,
        )


GRIDS: dict[str, Callable[[], Iterator[Case]]] = {"quick": lambda: iter(QUICK), "full": full}
