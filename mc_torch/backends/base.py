"""Interface of memories, their state, and the registry of backends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from mc_core.backends import add_backend, find_backend
from mc_core.memories import MemoryConfig
from mc_torch.numerics import Array, einsum_f32, expand_leading_dims, running_sum, scale_rows

Weights = tuple[Array, ...]  # per layer, each [..., h, o, i]
Apply = Callable[[int, Array], Array]  # (layer, a [..., h, c, i]) -> z [..., h, c, o]
Norm = tuple[Array, Array] | None  # (gain, bias) of a memory's layer norm, each [h, v]


class Coefficients(NamedTuple):
    """Write coefficients, each [b, t, h]; `coefficient_fields` lists those of a memory kind."""

    step: Array  # η_t > 0; for SWLA, weight λ_t of the current token
    retention: Array  # α_t in (0, 1]
    momentum: Array | None = None  # β_t in [0, 1)
    previous: Array | None = None  # weight β_t of the previous token (SWLA)


class Tokens(NamedTuple):
    """Inputs of a memory. Masked tokens are zero and have coefficients of 1."""

    q: Array  # [b, t, h, k]
    k: Array  # [b, t, h, k]
    v: Array  # [b, t, h, v]
    u: Array  # [b, t, h, k]
    coefficients: Coefficients  # each [b, t, h]
    mask: Array  # bool [b, t], False at masked tokens


class MemoryState(NamedTuple):
    """State of the online memory after a token."""

    weights: Weights
    momentum: Weights = ()  # S, same shapes as the weights; empty without momentum
    anchor: Weights = ()  # weights at the start of the chunk; empty if no gradient uses them
    previous: Weights = ()  # k [..., h, k] and v [..., h, v] of the last unmasked token, if used
    # Product of the retention since the start of the chunk [..., h], if used.
    retention: Any = ()


class ChunkDecay(NamedTuple):
    """Decay weights of a chunk: `W_t = P_t W_0 + Q_t S_0 - Σ_i C[t, i] G_i` (section 6)."""

    state: Array  # P [..., h, c]
    updates: Array  # C [..., h, c, e]
    momentum: Array | None = None  # Q [..., h, c]
    # Momentum after the chunk: `momentum_retention S_0 - Σ_i momentum_updates[i] G_i`.
    momentum_retention: Array | None = None  # [..., h]
    momentum_updates: Array | None = None  # [..., h, e]


class RankOneUpdates(NamedTuple):
    """Rank-one gradients of a chunk: update i of layer l is `errors[l] activations[l]ᵀ`."""

    activations: Weights  # a, each [..., h, e, i]
    errors: Weights  # δ, each [..., h, e, o]


@dataclass(frozen=True)
class Memory:
    """Base class of memory backends. Tokens are [..., h, c, k], coefficients [..., h, c].

    A subclass defines `read`, `loss` and `rank_one_updates`. By default, the other methods
    implement gradient steps with retention and without momentum. All methods take encoded queries
    and keys.

    Attributes:
        config: the memory's configuration.
        norm: (gain, bias) of the layer norm, or None.
        initial: weights W_0 per layer, each [h, o, i].
    """

    config: Any  # the MemoryConfig subclass of the registered kind
    norm: Norm = None
    initial: Weights = ()

    @property
    def target(self) -> Weights:
        """Weights [h, o, i] to which retention decays the memory; empty = zero."""
        return self.prepare(self.initial) if self.config.decays_to_initial else ()

    def prepare(self, initial: Weights) -> Weights:
        """Convert initial weights [h, o, i] to the weights of the state."""
        return initial

    def encode(self, x: Array) -> Array:
        """Convert queries or keys [..., h, c, k] to the inputs [..., h, c, i] of the memory.

        Zero for masked tokens, which are zero.
        """
        return x

    def encode_tokens(self, x: Array) -> Array:
        """Apply `encode` to [b, t, h, k]."""
        return self.encode(x.transpose(1, 2)).transpose(1, 2)

    def retain(self, weights: Weights, retention: Array) -> Weights:
        """Return `α W`, or `W_0 + α (W - W_0)` with a target; `retention` α is [..., h]."""
        factor = retention[..., None, None]
        if not self.target:
            return tuple(factor * w for w in weights)

        def one_layer(w: Array, target: Array) -> Array:
            target = expand_leading_dims(target, w.ndim).to(w.dtype)
            return target + factor * (w - target)

        return tuple(map(one_layer, weights, self.target))

    def update(
        self, state: MemoryState, k: Array, v: Array, coefficients: Coefficients
    ) -> MemoryState:
        """Write one token: `k` [..., h, 1, k], `v` [..., h, 1, v], coefficients [..., h].

        The default is `W_t = α_t W_{t-1} - η_t G_t`.
        """
        step = self.step(coefficients)[..., None, None]
        gradient = self.gradient(state, k, v, coefficients)
        retained = self.retain(state.weights, coefficients.retention)
        new = tuple(w - step * g for w, g in zip(retained, gradient, strict=True))
        return state._replace(weights=new)

    def gradient(
        self, state: MemoryState, k: Array, v: Array, coefficients: Coefficients
    ) -> Weights:
        """Return the inner gradients [..., h, o, i] of one token; arguments as in `update`."""
        weights = state.anchor or state.weights
        updates = self.rank_one_updates(weights, k, v)
        if self.config.delta_rule:
            (a,), (errors,) = updates
            retained = self.retain(weights, coefficients.retention)
            errors = errors + apply_weights(retained, k.dtype)(0, a)
            updates = RankOneUpdates((a,), (errors,))
        return outer_products(updates, weights[0].dtype)

    def step(self, coefficients: Coefficients) -> Array:
        """Return the factor [..., h, c] of a token's gradient in its write: η."""
        return coefficients.step

    def read(self, apply: Apply, q: Array) -> Array:
        """Read queries [..., h, c, k]; `apply` computes the memory's linear maps."""
        raise TypeError(f"{type(self).__name__} must define read")

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        """Return `weight` [..., h, c] times the read of q.

        If the last map is linear, override this method to scale its input instead of its output:
        the gradient of the weight then shares matrix products with the other gradients.
        """
        return scale_rows(weight, self.read(apply, q))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        """Return the inner loss [..., h, c] of `k` [..., h, c, k] and `v` [..., h, c, v]."""
        raise TypeError(f"{type(self).__name__} must define loss")

    def rank_one_updates(self, weights: Weights, k: Array, v: Array) -> RankOneUpdates:
        """Return the inner gradients of k [..., h, c, k] and v [..., h, c, v] at `weights`.

        With the delta rule, return those at the zero memory.
        """
        raise TypeError(f"{type(self).__name__} must define rank_one_updates")

    def apply_updates(
        self, state: MemoryState, updates: RankOneUpdates, decay: ChunkDecay, dtype: torch.dtype
    ) -> MemoryState:
        """Return the state after a chunk, from the state [..., h, o, i] before it (section 6).

        `W_c = P_c W_0 + Q_c S_0 - Σ_i C[c, i] G_i`, with c the last token; with a target T of the
        retention, `(1 - P_c) T` is added. `S_c = momentum_retention S_0 - Σ_i momentum_updates[i]
        G_i`.
        """
        retained = self.retain(state.weights, decay.state[..., -1])
        gradients = sum_updates(updates, decay.updates[..., -1, :], dtype)
        weights = tuple(w - g for w, g in zip(retained, gradients, strict=True))
        if decay.momentum is None:
            return state._replace(weights=weights)
        assert decay.momentum_updates is not None
        assert decay.momentum_retention is not None
        share = decay.momentum[..., -1, None, None]
        weights = tuple(w + share * s for w, s in zip(weights, state.momentum, strict=True))
        retention = decay.momentum_retention[..., None, None]
        gradients = sum_updates(updates, decay.momentum_updates, dtype)
        momentum = tuple(retention * s - g for s, g in zip(state.momentum, gradients, strict=True))
        return state._replace(weights=weights, momentum=momentum)

    def end_chunk(self, state: MemoryState) -> MemoryState:
        """Return the state [..., h, o, i] after a chunk; its last token has read the state before.

        `state` has `anchor`, the weights at the start of the chunk, and `retention`. Only called if
        `updates_at_chunk_end`.
        """
        raise TypeError(f"{type(self).__name__} must define end_chunk")

    def chunk_decay(self, coefficients: Coefficients, write_mask: Array) -> ChunkDecay:
        """Return the decay weights of a chunk; `write_mask` [..., h, c] is 0 at masked tokens.

        Default, without momentum: `C[t, i] = η_i α_{i+1} ... α_t`.
        """
        coefficients = mask_coefficients(coefficients, write_mask)
        decay = decay_products(coefficients.retention)
        return ChunkDecay(
            state=decay[..., 0], updates=decay[..., 1:] * coefficients.step[..., None, :]
        )


class MatrixMemory(Memory):
    """Memory of a single matrix, `M(q) = W q`, with the inner loss `-<M(k), v>`.

    The default write is `W_t = α_t W_{t-1} + η_t v_t k_tᵀ`.
    """

    def read(self, apply: Apply, q: Array) -> Array:
        return apply(0, q)

    def read_weighted(self, apply: Apply, q: Array, weight: Array) -> Array:
        return apply(0, scale_rows(weight, q))

    def loss(self, apply: Apply, k: Array, v: Array) -> Array:
        y = apply(0, k)
        return -torch.sum(y * v.to(y.dtype), dim=-1)

    def rank_one_updates(self, weights: Weights, k: Array, v: Array) -> RankOneUpdates:
        return RankOneUpdates((k,), (-v,))


M = TypeVar("M", bound=type[Memory])

BACKENDS: dict[str, type[Memory]] = {}  # by memory kind


def register_backend(kind: str) -> Callable[[M], M]:
    """Return a class decorator that registers the backend of a memory kind.

    Raises:
        ValueError: the class is not a subclass of `Memory`, or the kind is already registered.
    """

    def register(cls: M) -> M:
        add_backend(BACKENDS, kind, cls, Memory)
        return cls

    return register


def make_memory(config: MemoryConfig, norm: Norm = None, initial: Weights = ()) -> Memory:
    """Return the backend of a configuration.

    Args:
        config: the memory's configuration.
        norm: (gain, bias), each [h, v], for a memory with `norm="layer"`.
        initial: weights W_0 per layer, each [h, o, i]; not needed if tokens are neither written nor
            read.

    Raises:
        ValueError: the kind has no backend in this framework.
    """
    return find_backend(BACKENDS, config.kind, "mc_torch")(config, norm, initial)


def outer_products(updates: RankOneUpdates, dtype: torch.dtype) -> Weights:
    """Return the outer products [..., h, o, i] of the updates of a single token."""
    return tuple(
        delta[..., 0, :, None].to(dtype) * a[..., 0, None, :].to(dtype)
        for a, delta in zip(updates.activations, updates.errors, strict=True)
    )


def sum_updates(updates: RankOneUpdates, scale: Array, dtype: torch.dtype) -> Weights:
    """Return `Σ_i scale_i δ_i a_iᵀ` of each layer; `scale` is [..., h, e]."""

    def layer_sum(a: Array, delta: Array) -> Array:
        return einsum_f32("...eo,...ei->...oi", scale_rows(scale, delta), a, dtype=dtype)

    return tuple(map(layer_sum, updates.activations, updates.errors))


def apply_weights(weights: Weights, dtype: torch.dtype) -> Apply:
    """Return the function that multiplies by the weights [..., h, o, i] of a layer."""
    return lambda layer, a: einsum_f32("...oi,...ci->...co", weights[layer], a, dtype=dtype)


def decay_products(x: Array) -> Array:
    """Return cumulative products of `x` [..., c] between all pairs of tokens, via logarithms.

    Returns:
        [..., c, c + 1]: entry (t, i) is the product of x over tokens i + 1 to t, counted from 1;
        i = 0 is the start of the chunk. Entries with i > t are 0.
    """
    c = x.shape[-1]
    # Adding a small constant keeps a gradient for a factor of 0; a maximum would not.
    logs = torch.log(x + torch.finfo(x.dtype).tiny ** 0.75)
    # Sum each column separately. Differences of one cumulative sum would contain the rounding
    # errors of all earlier tokens, which are large if a factor is small.
    after = torch.ones(c, c + 1, dtype=torch.bool, device=x.device).tril()
    total = running_sum(torch.where(after, logs[..., None], 0.0))
    causal = torch.ones(c, c + 1, dtype=torch.bool, device=x.device).tril(1)
    return torch.exp(torch.where(causal, total, -torch.inf))


def previous_token(decay: ChunkDecay) -> ChunkDecay:
    """Return the decay weights of W_{t-1} from those of W_t."""
    state, updates, momentum = decay.state, decay.updates, decay.momentum
    state = torch.cat([torch.ones_like(state[..., :1]), state[..., :-1]], dim=-1)
    updates = torch.cat([torch.zeros_like(updates[..., :1, :]), updates[..., :-1, :]], dim=-2)
    if momentum is not None:
        first = torch.zeros_like(momentum[..., :1])
        momentum = torch.cat([first, momentum[..., :-1]], dim=-1)
    return decay._replace(state=state, updates=updates, momentum=momentum)


def mask_coefficients(coefficients: Coefficients, write_mask: Array) -> Coefficients:
    """Remove the write and the decay of masked tokens, where `write_mask` [..., h, c] is 0."""
    skip = 1 - write_mask
    step, retention, momentum, previous = coefficients
    return Coefficients(
        step=step * write_mask,
        retention=retention * write_mask + skip,
        momentum=None if momentum is None else momentum * write_mask + skip,
        previous=None if previous is None else previous * write_mask,
    )
