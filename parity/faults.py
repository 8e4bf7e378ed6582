"""Fault injection: each fault in `mc_torch` must be detected in the expected leaf."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.table import Table

from mc_core import LinearConfig, TitansConfig
from mc_torch.numerics import tree_map
from parity import run_jax, run_torch
from parity.cases import Case, draw
from parity.compare import Difference, Outcome, compare, tolerance
from parity.grids import case

# Maps a function to its faulty replacement.
Substitute = Callable[[Any], Any]

LINEAR = case(LinearConfig(), "grm", mask="some")
TITANS = case(TitansConfig(expansion=2), "grm", mask="some")
TIES = case(LinearConfig(), "ssc", ssc_top_k=1, ties=True)
LAYER = case(
    LinearConfig(coefficients="head"),
    "grm",
    level="layer",
    conv_width=4,
    qk_norm="l2",
    mask="padded",
)
STREAM = case(
    TitansConfig(expansion=2), "grm", level="layer", conv_width=4, mask="some", splits=(5, 1, 7)
)
ORTHOGONAL = case(
    TitansConfig(expansion=2, chunk_update="orthogonal"), "grm", mask="some", splits=(5, 1, 7)
)
STATE = "cache.stored.weights.0"


@dataclass(frozen=True)
class Fault:
    """A fault, and the leaf in which it must be detected.

    Attributes:
        name: name of the fault.
        case: a case that the fault affects.
        leaf: the first affected leaf, in forward order.
        patches: replacement of each function, by dotted name.
    """

    name: str
    case: Case
    leaf: str
    patches: dict[str, Substitute]


@dataclass(frozen=True)
class Finding:
    """Result of comparing a case with a fault, or without one if `fault` is None."""

    fault: Fault | None
    case: Case
    first: Difference | None

    @property
    def ok(self) -> bool:
        """True if the result is as expected."""
        wanted = self.fault.leaf if self.fault else None
        return wanted == (self.first.name if self.first else None)


def selftest() -> Iterator[Finding]:
    """Compare each case without a fault, then with each of its faults in `mc_torch`."""
    for affected in CASES:
        inputs, weights = draw(affected), run_jax.parameters(affected)
        expected = run_jax.run(affected, inputs, weights)
        allowed = tolerance(affected.dtype, "cpu", affected.tokens)
        for fault in (None, *(f for f in FAULTS if f.case == affected)):
            with injected(fault):
                actual = run_torch.run(affected, inputs, weights)
            outcome = Outcome(affected, compare(actual, expected, allowed))
            yield Finding(fault, affected, outcome.first_failure)


def injected(fault: Fault | None) -> ExitStack:
    """Return a context in which `mc_torch` has a fault; None for no fault."""
    stack = ExitStack()
    for name, substitute in (fault.patches if fault else {}).items():
        owner, _, attribute = name.rpartition(".")
        target = resolve_name(owner)
        new = substitute(getattr(target, attribute))
        stack.enter_context(patch.object(target, attribute, new))
    return stack


def table(findings: list[Finding]) -> Table:
    """Return a table of faults, their expected leaf, and the first leaf that differs."""
    rows = Table("fault in mc_torch", "case", "expected leaf", "first leaf that differs", "caught")
    for finding in findings:
        fault, first = finding.fault, finding.first
        rows.add_row(
            fault.name if fault else "no fault",
            " ".join(finding.case.name.split()[:2]),
            fault.leaf if fault else "none",
            first.describe() if first else "none",
            ("yes" if fault else "clean") if finding.ok else "NO",
            style=None if finding.ok else "red",
        )
    return rows


def summary(findings: list[Finding], seconds: float) -> str:
    """Return a one-line summary."""
    faulty = [finding for finding in findings if finding.fault]
    caught = sum(finding.ok for finding in faulty)
    clean = sum(finding.ok for finding in findings) - caught
    return (
        f"{caught} of {len(faulty)} faults caught in their leaf, "
        f"{clean} of {len(findings) - len(faulty)} cases equal without a fault, {seconds:.0f} s"
    )


def _wrong_sign(chunk_decay: Any) -> Any:
    def ascending(*args: Any) -> Any:
        decay = chunk_decay(*args)
        return decay._replace(updates=-decay.updates, momentum=-decay.momentum)

    return ascending


def _shifted_pools(pool_keys: Any) -> Any:
    def shifted(*args: Any) -> Any:
        pools = pool_keys(*args)
        return pools._replace(running=F.pad(pools.running, (0, 0, 0, 0, 1, 0))[:, :-1])

    return shifted


def _softmax_of_cached(normalize_scores: Any) -> Any:
    def cached_only(score: Any, read: Any, config: Any) -> Any:
        read = read.clone()
        read[..., -1] = ~read[..., :-1].any(-1)
        return normalize_scores(score, read, config)

    return cached_only


def _latest_of_ties(select_top_k: Any) -> Any:
    def reversed_(score: Any, readable: Any, top_k: int) -> Any:
        n = score.shape[-1]
        index = select_top_k(score.flip(-1), readable.flip(-1), top_k)
        return torch.where(index < n, n - 1 - index, index)

    return reversed_


def _without_mask(memory_caching: Any) -> Any:
    return lambda *args, mask, **options: memory_caching(*args, mask=None, **options)


def _in_float32(einsum_f32: Any) -> Any:
    def narrow(spec: str, *operands: Any, **options: Any) -> Any:
        result = einsum_f32(spec, *(x.float() for x in operands))
        return result.to(operands[0].dtype)

    return narrow


def _detached_pools(scores: Any) -> Any:
    return lambda u, pools, *args: scores(u, pools.detach(), *args)


def _stale_segment_ends(segment_ends: Any) -> Any:
    def stale(*args: Any) -> Any:
        ends = segment_ends(*args)
        return tree_map(lambda w: torch.cat([w[:, :1], w[:, :-1]], dim=1), ends)

    return stale


def _clip_without_gradient(clipped: Any) -> Any:
    def constant(delta: Any, a: Any, clip: float) -> Any:
        return delta * (clipped(delta, a, clip) / delta).nan_to_num().detach()

    return constant


def _float32_output(memory_caching: Any) -> Any:
    def narrow(*args: Any, **options: Any) -> Any:
        result = memory_caching(*args, **options)
        return result._replace(output=result.output.float())

    return narrow


def _sqrt_at_zero(l2_normalize: Any) -> Any:
    return lambda x: l2_normalize(x) + 0 * x.square().sum(-1, keepdim=True).sqrt()


def _one_token_ahead(forward: Any) -> Any:
    return lambda conv, x, before: forward(conv, F.pad(x, (0, 0, 0, 1))[:, 1:], before)


def _transposed(to_torch: Any) -> Any:
    def swapped(flat: Any) -> Any:
        weights = to_torch(flat)
        return weights | {"v_proj.weight": weights["v_proj.weight"].T.copy()}

    return swapped


def _large_eps(_: Any) -> Any:
    return lambda x, scale: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale


def _mask_only_steps(_: Any) -> Any:
    return lambda coefficients, write_mask: coefficients._replace(
        step=coefficients.step * write_mask
    )


def _every_token_starts_a_chunk(make_call_layout: Any) -> Any:
    def refreshed(*args: Any) -> Any:
        layout = make_call_layout(*args)
        return layout._replace(has_first_token=torch.ones_like(layout.has_first_token))

    return refreshed


def _every_call_ends_a_chunk(make_call_layout: Any) -> Any:
    def ended(*args: Any) -> Any:
        layout = make_call_layout(*args)
        return layout._replace(completes_chunk=torch.ones_like(layout.completes_chunk))

    return ended


def _next_slot(write_slots: Any) -> Any:
    return lambda stored, segments, slots: write_slots(stored, segments, slots + 1)


def _pool_without_cache(pool: Any) -> Any:
    def current_call(k: Any, mask: Any, layout: Any, cache: Any, config: Any) -> Any:
        cache = cache._replace(pool_sum=torch.zeros_like(cache.pool_sum))
        return pool(k, mask, layout, cache, config)

    return current_call


FAULTS = (
    Fault("mask ignored", LINEAR, STATE, {"parity.run_torch.memory_caching": _without_mask}),
    Fault(
        "decay at masked tokens",
        LINEAR,
        STATE,
        {
            "mc_torch.functional._zero_masked": lambda f: (
                lambda *a: f(*a)._replace(coefficients=a[4])
            ),
            "mc_torch.backends.base.mask_coefficients": _mask_only_steps,
        },
    ),
    Fault(
        "stale cached state",
        LINEAR,
        STATE,
        {"mc_torch.chunked._segment_ends": _stale_segment_ends},
    ),
    Fault(
        "float32 in a float64 path",
        LINEAR,
        STATE,
        {"mc_torch.backends.base.einsum_f32": _in_float32},
    ),
    Fault(
        "pool off by one token",
        LINEAR,
        "gates",
        {"mc_torch.functional.pool_keys": _shifted_pools},
    ),
    Fault(
        "softmax without the online memory",
        LINEAR,
        "gates",
        {"mc_torch.gates.normalize_scores": _softmax_of_cached},
    ),
    Fault(
        "output in another dtype",
        LINEAR,
        "output",
        {"parity.run_torch.memory_caching": _float32_output},
    ),
    Fault(
        "dropped gradient path: cached pools",
        LINEAR,
        "gradient.k",
        {"mc_torch.gates.gate_scores": _detached_pools},
    ),
    Fault(
        "tanh gelu",
        TITANS,
        STATE,
        {"mc_torch.backends.mlp.gelu": lambda _: lambda x: F.gelu(x, approximate="tanh")},
    ),
    Fault(
        "momentum sign", TITANS, STATE, {"mc_torch.backends.titans.Titans.chunk_decay": _wrong_sign}
    ),
    Fault(
        "half the inner gradient",
        TITANS,
        STATE,
        {"mc_torch.backends.mlp.MLPMemory._output_gradient": lambda f: lambda *a: 0.5 * f(*a)},
    ),
    Fault(
        "dropped gradient path: inner clip",
        TITANS,
        "gradient.k",
        {"mc_torch.backends.mlp._clip_errors": _clip_without_gradient},
    ),
    Fault("top-k tie order", TIES, "gates", {"mc_torch.gates.select_top_k": _latest_of_ties}),
    Fault("transposed weight", LAYER, STATE, {"parity.run_torch.to_torch": _transposed}),
    Fault(
        "convolution one token ahead",
        LAYER,
        STATE,
        {"mc_torch.modules.ShortConv.forward": _one_token_ahead},
    ),
    Fault(
        "memory after a write instead of before it",
        LAYER,
        "trace.update_norm",
        {"mc_torch.inspection.previous_token": lambda _: lambda decay: decay},
    ),
    Fault("wrong norm eps", LAYER, "output", {"mc_torch.modules.rms_norm": _large_eps}),
    Fault(
        "NaN gradient of a norm at zero",
        LAYER,
        "gradient.k_conv.kernel",
        {"mc_torch.layer.l2_normalize": _sqrt_at_zero},
    ),
    Fault(
        "convolution ignores the previous call",
        STREAM,
        STATE,
        {"mc_torch.modules.ShortConv.tail": lambda f: lambda *a: torch.zeros_like(f(*a))},
    ),
    Fault(
        "anchor refreshed inside a chunk",
        STREAM,
        STATE,
        {"mc_torch.streaming.make_call_layout": _every_token_starts_a_chunk},
    ),
    Fault(
        "update of a chunk not orthogonalized",
        ORTHOGONAL,
        STATE,
        {"mc_torch.backends.mlp.orthogonalize": lambda _: lambda update: update},
    ),
    Fault(
        "update orthogonalized at the end of a call",
        ORTHOGONAL,
        STATE,
        {"mc_torch.streaming.make_call_layout": _every_call_ends_a_chunk},
    ),
    Fault(
        "completed segment in the next slot",
        STREAM,
        STATE,
        {"mc_torch.streaming.write_slots": _next_slot},
    ),
    Fault(
        "pool restarts at every call",
        STREAM,
        "cache.stored.pool",
        {"mc_torch.streaming._pool": _pool_without_cache},
    ),
)
CASES = tuple(dict.fromkeys(fault.case for fault in FAULTS))
