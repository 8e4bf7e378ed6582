"""Log-linear attention in NumPy, one pair of tokens at a time, written from section 7."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class LogLinearCase(NamedTuple):
    """Arguments of `log_linear_attention`, and a cotangent of its output."""

    q: Array  # [b, t, h, k]
    k: Array  # [b, t, h, k]
    v: Array  # [b, t, h, v]
    level_weights: Array  # [b, t, h, l]
    retention: Array  # [b, t, h]
    cotangent: Array  # [b, t, h, v]
    mask: Array | None = None  # bool [b, t]

    @property
    def inputs(self) -> tuple[Array, ...]:
        """The differentiable inputs, in the order of the arguments."""
        return self[:5]

    @property
    def written(self) -> Array:
        """The mask, all True if there is none."""
        return np.ones(self.q.shape[:2], bool) if self.mask is None else self.mask


def make_log_linear_case(
    tokens: int, mask: bool = False, *, extra_levels: int = 0, seed: int = 0
) -> LogLinearCase:
    """Draw a case with as many levels as needed, and `extra_levels` more."""
    rng = np.random.default_rng([seed, tokens])
    shape = (2, tokens, 2)
    q, k = rng.standard_normal((2, *shape, 4))
    v, cotangent = rng.standard_normal((2, *shape, 3))
    levels = len(bin(tokens - 1)[2:]) + 1 if tokens > 1 else 1
    weights = rng.uniform(0.0, 2.0, (*shape, levels + extra_levels))
    retention = rng.uniform(0.6, 1.0, shape)
    some = rng.random((2, tokens)) < 0.6
    return LogLinearCase(q, k, v, weights, retention, cotangent, some if mask else None)


def buckets(token: int) -> dict[int, int]:
    """Return the level of every token s <= `token`, from the definition of the buckets."""
    levels, end = {token: 0}, token
    while end:
        lowest = end & -end  # 2 ** lssb(end)
        levels |= dict.fromkeys(range(end - lowest, end), len(bin(lowest)[2:]))
        end -= lowest
    return levels


def output(case: LogLinearCase) -> Array:
    """Return `o_t = Σ λ_t^ℓ(t,s) (Π α_r) <q_t, k_s> v_s` [b, t, h, v]."""
    q, k, v, *_ = case
    y = np.zeros(v.shape)
    for row, t, s, head, weight, decay in _pairs(case):
        product = q[row, t, head] @ k[row, s, head]
        y[row, t, head] += weight * decay * product * v[row, s, head]
    return y


def gradients(case: LogLinearCase) -> tuple[Array, ...]:
    """Return the gradients of q, k, v, level weights and retention under the cotangent."""
    q, k, v, _, retention, g, _ = case
    dq, dk, dv, dweights, dretention = map(np.zeros_like, case.inputs)
    for row, t, s, head, weight, decay in _pairs(case):
        at_t, at_s = (row, t, head), (row, s, head)
        product, error = q[at_t] @ k[at_s], g[at_t] @ v[at_s]
        dq[at_t] += weight * decay * error * k[at_s]
        dk[at_s] += weight * decay * error * q[at_t]
        dv[at_s] += weight * decay * product * g[at_t]
        dweights[(*at_t, buckets(t)[s])] += decay * product * error
        for r in range(s + 1, t + 1):
            if case.written[row, r]:
                at_r = row, r, head
                dretention[at_r] += weight * decay * product * error / retention[at_r]
    return dq, dk, dv, dweights, dretention


def states(case: LogLinearCase) -> Array:
    """Return the states after the last token [b, h, l, v, k], by the recurrent form.

    At t > 0 with j = lssb(t), the states 0 to j move to j + 1; then all decay, and the state 0
    becomes `v_t k_tᵀ`.
    """
    b, tokens, h, _ = case.q.shape
    levels = case.level_weights.shape[-1]
    s = np.zeros((b, h, levels, case.v.shape[-1], case.k.shape[-1]))
    for row, t, head in np.ndindex(b, tokens, h):
        state = s[row, head]
        if t:
            j = len(bin(t & -t)[2:]) - 1
            state[j + 1] = state[: j + 1].sum(0)
            state[: j + 1] = 0
        if case.written[row, t]:
            state *= case.retention[row, t, head]
            state[0] = np.outer(case.v[row, t, head], case.k[row, t, head])
    return s


def _pairs(case: LogLinearCase) -> Iterator[tuple[Any, ...]]:
    """Yield row, t, s, head, level weight and decay of all pairs of unmasked tokens, s <= t."""
    b, tokens, h, _ = case.q.shape
    written = case.written
    for row, t, head in np.ndindex(b, tokens, h):
        if not written[row, t]:
            continue
        for s, level in buckets(t).items():
            if written[row, s]:
                decays = [
                    case.retention[row, r, head] for r in range(s + 1, t + 1) if written[row, r]
                ]
                yield row, t, s, head, case.level_weights[row, t, head, level], np.prod(decays)
