"""What the memory kinds have in common: their state, their chunk coefficients, their interface."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from mc_core.config import MemoryConfig
from mc_torch.numerics import Array, product, running_sum

Weights = tuple[Array, ...]  # first layer first, each [..., h, o, i]
Apply = Callable[[int, Array], Array]  # (layer, a [..., h, c, i]) -> z [..., h, c, o]


class Coefficients(NamedTuple):
    """Write coefficients, each [b, t, h]; for `swla` `step` is λ and `previous` β."""

    step: Array  # η_t > 0
    retention: Array  # α_t in (0, 1]
    momentum: Array | None = None  # β_t in [0, 1), `titans` alone
    previous: Array | None = None  # weight of the token before, `swla` alone


class Tokens(NamedTuple):
    """A sequence as memories take it: zeros, and coefficients of 1, at masked tokens."""

    q: Array  # [b, t, h, k], as k and u
    k: Array
    v: Array  # [b, t, h, v]
    u: Array
    coefficients: Coefficients  # each [b, t, h]
    mask: Array  # bool [b, t], True = a real token


class MemoryState(NamedTuple):
    """The online memory between two tokens, valid anywhere in a chunk or segment."""

    weights: Weights
    momentum: Weights = ()  # S, as the weights; `titans` alone
    anchor: Weights = ()  # the weights as the current chunk began; MLP memories alone
    previous: Weights = ()  # (k, v) [..., h, k], [..., h, v] of the last real token; `swla` alone


class ChunkMix(NamedTuple):
    """Section 6: `W_t = P_t W_0 + Q_t S_0 - Σ_i C[t, i] G_i` for the tokens t of a chunk."""

    state: Array  # P [..., h, c]
    events: Array  # C [..., h, c, e]
    momentum: Array | None = None  # Q [..., h, c]
    # The last momentum is `keep * S_0 - Σ_i add[i] G_i`.
    momentum_keep: Array | None = None  # [..., h]
    momentum_add: Array | None = None  # [..., h, e]


class Events(NamedTuple):
    """Rank-one writes of a chunk: the gradient of event i in layer l is `deltas[l] inputs[l]ᵀ`."""

    inputs: Weights  # a, each [..., h, e, i]
    deltas: Weights  # δ, each [..., h, e, o]


class Memory(Protocol):
    """One memory kind. Token arrays are [..., h, c, k], coefficients [..., h, c]."""

    @property
    def config(self) -> MemoryConfig:
        """The memory's configuration."""

    @property
    def mixes_linearly(self) -> bool:
        """Whether a read is linear in the weights, so that reading a sum is summing reads."""

    @property
    def is_mlp(self) -> bool:
        """Whether the write's gradient depends on the memory."""

    @property
    def reaches_back(self) -> bool:
        """Whether a token writes the one before it, too."""

    def prepare(self, initial: Weights) -> Weights:
        """Bring the caller's initial weights [h, o, i] into the state's form."""

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        """Write one token: `k` [..., h, 1, k], `v` [..., h, 1, v], coefficients [..., h]."""

    def read(self, apply: Apply, q: Array) -> Array:
        """Read queries [..., h, c, k] through `apply`, the memory's linear maps."""

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        """Return `weight` [..., h, c] times the read of q.

        Where the last map is linear its input is weighed, not its output: then the gradient by the
        weight takes no product that the other gradients do not take.
        """

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        """Return the inner loss [..., h, c] of `k` [..., h, c, k] and `v` [..., h, c, v]."""

    def events(self, weights: Weights, k: Array, v: Array) -> Events:
        """Return the rank-one writes of tokens whose gradients are taken at `weights`."""

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        """Return the coefficients of a chunk; `written` [..., h, c] is 0 at masked tokens."""


def apply_weights(weights: Weights, dtype: torch.dtype) -> Apply:
    """Return the linear maps of plain weights [..., h, o, i]."""
    return lambda layer, a: product("...oi,...ci->...co", weights[layer], a, dtype=dtype)


def decay_products(x: Array) -> Array:
    """Return the products of `x` [..., c] between tokens, in logarithms.

    Returns:
        [..., c, c + 1]: entry (t, i) is the product of x over the tokens after event i up to t, in
        which event 0 stands before the chunk; 0 where the event comes after t.
    """
    c = x.shape[-1]
    # With a floor that is added, a factor of 0 has the gradient that it should.
    logs = torch.log(x + torch.finfo(x.dtype).tiny ** 0.75)
    # Each event sums its own tokens. Differences of one sum from the chunk's start would carry the
    # errors of all that came before the event, which are large where a factor is small.
    after = torch.ones(c, c + 1, dtype=torch.bool, device=x.device).tril()
    total = running_sum(torch.where(after, logs[..., None], 0.0))
    causal = torch.ones(c, c + 1, dtype=torch.bool, device=x.device).tril(1)
    return torch.exp(torch.where(causal, total, -torch.inf))


def mask_coefficients(at: Coefficients, written: Array) -> Coefficients:
    """Make masked tokens write nothing and decay nothing."""
    kept = 1 - written
    return Coefficients(
        step=at.step * written,
        retention=at.retention * written + kept,
        momentum=None if at.momentum is None else at.momentum * written + kept,
        previous=None if at.previous is None else at.previous * written,
    )
