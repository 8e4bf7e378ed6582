"""The interface of a memory, the state that it is carried in, and the registry of backends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp

from mc_core.backends import add_backend, find_backend
from mc_core.memories import MemoryConfig
from mc_jax.numerics import Array, product, running_sum, scale_rows

Weights = tuple[Array, ...]  # first layer first, each [..., h, o, i]
Apply = Callable[[int, Array], Array]  # (layer, a [..., h, c, i]) -> z [..., h, c, o]
Norm = tuple[Array, Array] | None  # (gain, bias) of a memory's layer norm, each [h, v]


class Coefficients(NamedTuple):
    """Write coefficients, each [b, t, h]; the memory's configuration says which it takes."""

    step: Array  # η_t > 0; the weight of the newest token where the previous one is written, too
    retention: Array  # α_t in (0, 1]
    momentum: Array | None = None  # β_t in [0, 1)
    previous: Array | None = None  # weight of the token before


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
    momentum: Weights = ()  # S, as the weights; empty without a momentum
    anchor: Weights = ()  # the weights as the current chunk began, where gradients use them
    previous: Weights = ()  # (k, v) [..., h, k], [..., h, v] of the last real token, where used


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


@dataclass(frozen=True)
class Memory:
    """One memory kind. Token arrays are [..., h, c, k], coefficients [..., h, c].

    A subclass defines `read`, `loss` and `events`; the other methods have defaults for a memory
    that is written by decayed gradient steps without momentum.

    Attributes:
        config: the memory's configuration.
        norm: (gain, bias) of its layer norm, or None.
    """

    config: Any  # a MemoryConfig, of the subclass that the backend is registered for
    norm: Norm = None

    def prepare(self, initial: Weights) -> Weights:
        """Bring the caller's initial weights [h, o, i] into the state's form."""
        return initial

    def update(self, state: MemoryState, k: Array, v: Array, at: Coefficients) -> MemoryState:
        """Write one token: `k` [..., h, 1, k], `v` [..., h, 1, v], coefficients [..., h].

        The default is `W_t = α_t W_{t-1} - η_t G_t`.
        """
        events = self.events(state.anchor or state.weights, k, v)
        step, retention = at.step[..., None, None], at.retention[..., None, None]
        gradient = outer_products(events, state.weights[0].dtype)
        new = tuple(retention * w - step * g for w, g in zip(state.weights, gradient, strict=True))
        return state._replace(weights=new)

    def read(self, apply: Apply, q: Array) -> Array:
        """Read queries [..., h, c, k] through `apply`, the memory's linear maps."""
        raise TypeError(f"{type(self).__name__} must define read")

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        """Return `weight` [..., h, c] times the read of q.

        Where the last map is linear, scale its input rather than its output: the gradient with
        respect to the weight then shares its products with the other gradients.
        """
        return scale_rows(weight, self.read(apply, q))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        """Return the inner loss [..., h, c] of `k` [..., h, c, k] and `v` [..., h, c, v]."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def events(self, weights: Weights, k: Array, v: Array) -> Events:
        """Return the rank-one gradients of k [..., h, c, k] and v [..., h, c, v] at `weights`."""
        raise TypeError(f"{type(self).__name__} must define events")

    def chunk_mix(self, at: Coefficients, written: Array) -> ChunkMix:
        """Return the coefficients of a chunk; `written` [..., h, c] is 0 at masked tokens.

        The default has no momentum: `C[t, i] = η_i α_{i+1} ... α_t`.
        """
        at = mask_coefficients(at, written)
        decay = decay_products(at.retention)
        return ChunkMix(state=decay[..., 0], events=decay[..., 1:] * at.step[..., None, :])


class MatrixMemory(Memory):
    """A memory of one matrix, `M(q) = W q`, with the inner loss `-<M(k), v>`.

    By default `W_t = α_t W_{t-1} + η_t v_t k_tᵀ`; `events` may use the weights, too.
    """

    def read(self, apply: Apply, q: Array) -> Array:
        return apply(0, q)

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        return apply(0, scale_rows(weight, q))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = apply(0, k)
        return -jnp.sum(y * v.astype(y.dtype), axis=-1)

    def events(self, weights: Weights, k: Array, v: Array) -> Events:
        return Events((k,), (-v,))


M = TypeVar("M", bound=type[Memory])

BACKENDS: dict[str, type[Memory]] = {}  # by the memory's kind


def register_backend(kind: str) -> Callable[[M], M]:
    """Make a class the memory of the configurations of this `kind`, as a class decorator.

    Raises:
        ValueError: the class is no `Memory`, or another class has the kind.
    """

    def register(cls: M) -> M:
        add_backend(BACKENDS, kind, cls, Memory)
        return cls

    return register


def make_memory(config: MemoryConfig, norm: Norm = None) -> Memory:
    """Return the memory of a configuration; `norm` is (gain, bias), each [h, v].

    Raises:
        ValueError: no backend of this framework is registered for the kind.
    """
    return find_backend(BACKENDS, config.kind, "mc_jax")(config, norm)


def outer_products(events: Events, dtype: jnp.dtype) -> Weights:
    """Return the gradients [..., h, o, i] of the single token of `events`, in a dtype."""
    return tuple(
        delta[..., 0, :, None].astype(dtype) * a[..., 0, None, :].astype(dtype)
        for a, delta in zip(events.inputs, events.deltas, strict=True)
    )


def apply_weights(weights: Weights, dtype: jnp.dtype) -> Apply:
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
    logs = jnp.log(x + float(jnp.finfo(x.dtype).tiny) ** 0.75)
    # Each event sums its own tokens. Differences of one sum from the chunk's start would carry the
    # errors of all that came before the event, which are large where a factor is small.
    after = jnp.tril(jnp.ones((c, c + 1), bool))
    total = running_sum(jnp.where(after, logs[..., None], 0))
    causal = jnp.tril(jnp.ones((c, c + 1), bool), k=1)
    return jnp.exp(jnp.where(causal, total, -jnp.inf))


def mask_coefficients(at: Coefficients, written: Array) -> Coefficients:
    """Make masked tokens write nothing and decay nothing; `written` [..., h, c] is 0 there."""
    kept = 1 - written
    return Coefficients(
        step=at.step * written,
        retention=at.retention * written + kept,
        momentum=None if at.momentum is None else at.momentum * written + kept,
        previous=None if at.previous is None else at.previous * written,
    )
