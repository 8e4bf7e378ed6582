"""`mc bench peers`: interleaved timings of this package and alternative packages."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from bench import jax_layers, rivals, torch_layers
from bench.devices import DEVICES_NOTE, named
from bench.timing import WARM_CACHE_NOTE, Subject, alternate, ratio
from mc_core import DeltaConfig, LinearConfig, MCConfig, MemoryConfig, TitansConfig
from mc_core.errors import UserError
from mc_core.tables import ResultTable, Row
from mc_core.weights import Flat
from mc_jax.sharding import local
from parity.environment import cores, result_table

ROWS = 2  # sequences of a batch
WIDTH, HEADS, SEGMENT = 256, 4, 64
TOLERANCE = (
    1e-4  # relative RMS error of outputs and gradients in float32, if the functions are equal
)


@dataclass(frozen=True)
class Comparison:
    """Subjects for the same task; the first one is the reference.

    Attributes:
        build: compiles the subjects; JAX subjects are compiled for each number of devices.
        relative_time: report the time per token relative to the first subject on the same number of
            devices; otherwise report the speedup over the first subject.
        equal: all subjects compute the same function; outputs and gradients are also compared.
    """

    build: Callable[[Sequence[int]], list[Subject]]
    relative_time: bool = False
    equal: bool = False


def comparisons() -> dict[str, Comparison]:
    """Return all comparisons by name."""
    result = {
        f"linear-{tokens}": Comparison(partial(_published, "linear", tokens, (64,)), equal=True)
        for tokens in (1024, 4096)
    }
    result["titans-1024"] = Comparison(partial(_published, "titans", 1024, (1, 16)))
    for chunk in (16, 64):
        result[f"base-titans-{chunk}"] = Comparison(partial(_titans_pytorch, chunk))
    result["delta-1024"] = Comparison(partial(_delta, 1024))
    for kind in ("linear", "titans"):
        result[f"ssc-{kind}"] = Comparison(
            partial(_against_none, kind, "ssc", 4096), relative_time=True
        )
        result[f"length-{kind}"] = Comparison(partial(_lengths, kind), relative_time=True)
    for tokens in (1024, 4096):
        result[f"attention-{tokens}"] = Comparison(partial(_attention, tokens))
    if torch.cuda.is_available():
        for kind in ("linear", "gla", "delta"):
            result[f"fla-{kind}"] = Comparison(partial(_flash_linear, kind))
        for tokens in (4096, 32768):
            result[f"flash-attention-{tokens}"] = Comparison(partial(_flash_attention, tokens))
    return result


def default_devices() -> tuple[int, ...]:
    """Return (1, 2) on a CPU with two cores and two JAX devices, otherwise (1,)."""
    both = jax.default_backend() == "cpu" and min(len(cores()), jax.local_device_count(), ROWS) >= 2
    return (1, 2) if both else (1,)


def run(
    names: Sequence[str],
    runs: int,
    threads: int | None = None,
    devices: Sequence[int] = (),
) -> ResultTable:
    """Run comparisons one after another; the runs of the subjects of a comparison alternate.

    Args:
        names: keys of `comparisons()`; empty = all.
        runs: number of timed runs per subject.
        threads: number of intra-op threads of torch; None = torch's default.
        devices: numbers of devices over which JAX subjects split the batch; empty =
            `default_devices()`.

    Raises:
        UserError: a name is unknown, a peer is not installed, or a number of devices is invalid.
    """
    known = comparisons()
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: must be one of {', '.join(known)}")
    devices = devices or default_devices()
    for count in devices:
        local(count, "--devices", ROWS)
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    for name in names or known:
        rows += measure(name, known[name], runs, devices)
    notes = [
        f"torch: {torch.get_num_threads()} threads",
        "times faster: median of the ratios per turn, in wall-clock time and in processor time",
        "titans-pytorch evaluates all gradients of a batch at the first weights and takes one step "
        "per chunk: less work than a causal write of every token",
        WARM_CACHE_NOTE,
    ]
    if max(devices) > 1:
        notes.append(DEVICES_NOTE)
    return result_table("Peers, forward and backward, whole layer", rows, notes)


def measure(
    name: str, comparison: Comparison, runs: int, devices: Sequence[int] = (1,)
) -> list[Row]:
    """Time the subjects of a comparison in alternating runs; return one row per subject."""
    subjects = comparison.build(devices)
    times = alternate({s.name: s.run for s in subjects}, runs, warmup=1)
    expected = _output_and_input_gradient(subjects[0]) if comparison.equal else None
    rows = []
    for subject in subjects:
        references = (
            s for s in subjects if not comparison.relative_time or s.devices == subject.devices
        )
        reference = next(references)
        timing, base = times[subject.name], times[reference.name]
        cells: Row = {
            "comparison": name,
            "subject": subject.name,
            "dtype": subject.dtype,
            "runs": len(timing.seconds),
            "ms": 1e3 * timing.median,
            "spread": f"{timing.spread:.0%}",
            "processor ms": 1e3 * timing.processor_median,
            "tokens/s": subject.tokens / timing.median,
        }
        if subject is not reference:
            wall, processor = ratio(base, timing)
            if comparison.relative_time:
                share = reference.tokens / subject.tokens
                wall, processor = share / wall, share / processor
            kind = "relative time" if comparison.relative_time else "times faster"
            cells |= {kind: wall, f"{kind} (processor)": processor}
            if expected is not None:
                cells["error"] = f"{_distance(expected, _output_and_input_gradient(subject)):.0e}"
        cells["compile s"] = subject.compile_s
        rows.append(cells)
    return rows


def _published(
    kind: str, tokens: int, chunks: Sequence[int], devices: Sequence[int]
) -> list[Subject]:
    theirs, config, flat = rivals.published(kind, "grm", ROWS, tokens)
    subjects = [theirs]
    for chunk in chunks:
        ours = dataclasses.replace(config, chunk_size=chunk)
        subjects += _jax(ours, tokens, f"mc_jax chunk {chunk}", devices, flat=flat)
        if chunk > 1:
            name = f"mc_torch chunk {chunk}"
            subjects.append(torch_layers.subject(ours, ROWS, tokens, flat=flat, name=name))
    return subjects


def _titans_pytorch(chunk: int, devices: Sequence[int]) -> list[Subject]:
    # The memory of titans-pytorch is `x + LN(MLP(x))`.
    config = _config(TitansConfig(norm="layer"), "none", chunk)
    return [
        rivals.titans_pytorch(chunk, ROWS, 1024),
        *_jax(config, 1024, "mc_jax", devices),
        torch_layers.subject(config, ROWS, 1024, name="mc_torch"),
    ]


def _delta(tokens: int, devices: Sequence[int]) -> list[Subject]:
    delta, linear = (_config(memory, "none", 64) for memory in (DeltaConfig(), LinearConfig()))
    return [
        rivals.flash_delta_naive(HEADS, ROWS, tokens),
        *_jax(delta, tokens, "mc_jax", devices),
        torch_layers.subject(delta, ROWS, tokens, name="mc_torch"),
        *_jax(linear, tokens, "mc_jax linear", devices),
    ]


def _small_config(kind: str, aggregation: str) -> MCConfig:
    if kind == "linear":
        return _config(LinearConfig(), aggregation, 64)
    return _config(TitansConfig(expansion=1), aggregation, 16)


def _against_none(
    kind: str, aggregation: str, tokens: int, devices: Sequence[int]
) -> list[Subject]:
    return [
        subject
        for each in ("none", aggregation)
        for subject in _jax(_small_config(kind, each), tokens, f"{kind} + {each}", devices)
    ]


def _lengths(kind: str, devices: Sequence[int]) -> list[Subject]:
    return [
        subject
        for tokens in (4096, 16384)
        for subject in _jax(_small_config(kind, "ssc"), tokens, f"{tokens:,} tokens", devices)
    ]


def _attention(tokens: int, devices: Sequence[int]) -> list[Subject]:
    ours = [
        subject
        for kind in ("linear", "titans")
        for subject in _jax(_small_config(kind, "grm"), tokens, f"mc_jax {kind} + grm", devices)
    ]
    return [*rivals.attention(WIDTH, HEADS, ROWS, tokens, devices=devices), *ours]


def _jax(
    config: MCConfig, tokens: int, name: str, devices: Sequence[int], flat: Flat | None = None
) -> list[Subject]:
    """Return a layer of `mc_jax` on each number of devices."""
    return [
        jax_layers.subject(config, ROWS, tokens, flat=flat, name=named(name, count), devices=count)
        for count in devices
    ]


def _flash_linear(kind: str, _: Sequence[int]) -> list[Subject]:
    # One sequence, which cannot be split over devices.
    heads, tokens = 32, 8192
    memory: MemoryConfig = DeltaConfig(coefficients="constant", retention=0.99)
    if kind != "delta":
        memory = LinearConfig(coefficients="constant", retention=1.0 if kind == "linear" else 0.99)
    config = MCConfig(128 * heads, heads, memory=memory, aggregation="none", output_norm="none")
    return [
        rivals.flash_linear(kind, heads, tokens),
        jax_layers.subject(config, 1, tokens, dtype="bfloat16", name="mc_jax"),
        torch_layers.subject(config, 1, tokens, dtype="bfloat16", name="mc_torch"),
    ]


def _flash_attention(tokens: int, _: Sequence[int]) -> list[Subject]:
    # One sequence, which cannot be split over devices.
    width, heads = 2048, 16
    ours = [
        jax_layers.subject(
            MCConfig(
                width,
                heads,
                memory=memory,
                aggregation=aggregation,
                segment_size=1024,
                chunk_size=chunk,
            ),
            1,
            tokens,
            dtype="bfloat16",
            name=f"mc_jax {memory.kind} + {aggregation}",
        )
        for memory, chunk in ((LinearConfig(), 128), (TitansConfig(expansion=1), 64))
        for aggregation in ("none", "grm", "ssc")
    ]
    return [*rivals.attention(width, heads, 1, tokens, dtype="bfloat16"), *ours]


def _config(memory: MemoryConfig, aggregation: str, chunk: int) -> MCConfig:
    return MCConfig(
        WIDTH,
        HEADS,
        memory=memory,
        aggregation=aggregation,
        segment_size=SEGMENT,
        chunk_size=chunk,
    )


def _output_and_input_gradient(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Return the output, and the gradient with respect to the input tokens."""
    y, *gradients = subject.run()
    x = gradients[-1] if subject.name.startswith("mc_jax") else gradients[0]
    return _to_numpy(y), _to_numpy(x)


def _to_numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _distance(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """Return the larger relative RMS error of the output and the gradient.

    Raises:
        UserError: the error exceeds `TOLERANCE`.
    """
    distance = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(left, right, strict=True)
    )
    if not distance < TOLERANCE:
        raise UserError(
            f"outputs differ by {distance:.0e} (relative RMS): must be below {TOLERANCE:.0e}"
        )
    return distance
