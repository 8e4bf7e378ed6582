"""Streaming state of a layer after any token."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core import cache_checks
from mc_core.cache_checks import INVALIDATED, NO_SLOT, check_cache_options
from mc_core.config import MCConfig
from mc_core.segmentation import Plan, check_streaming_config
from mc_jax.backends import Memory, MemoryState, Weights, make_memory
from mc_jax.cache_rows import Rows, take_rows
from mc_jax.level_cache import LevelCache
from mc_jax.numerics import Array, Dtype, state_dtype
from mc_jax.offload import move_to_host, on_host, update_in_place

Tree = Any  # nested tuples of arrays
MaybeArray = Any  # an array; () if unused


class Segments(NamedTuple):
    """Memories after the latest token of each segment (section 4), or of each bucket (section 7).

    In a cache with buckets, index i is the bucket of 2^i segments; all its values are 0 if there is
    none. The last two fields are () without buckets.
    """

    weights: Weights  # per layer, each [b, n, h, o, i]
    pool: Array  # pooled keys m [b, n, h, k]
    length: Array  # number of unmasked tokens of the segment, int32 [b, n]
    pool_sum: MaybeArray = ()  # sum of the keys [b, n, h, k]
    # Product of the retention of all tokens [b, n, h]; () if no states are summed.
    retention: MaybeArray = ()


class Cache(NamedTuple):
    """State of the streams of a memory layer. Rows are independent."""

    # Complete segments, one per slot; `segments` also includes the online one. Or buckets.
    stored: Segments
    total: Weights  # sum of the weights of complete segments; () if reads do not use it
    state: MemoryState  # the online memory
    pool_sum: Array  # sum of the online segment's keys [b, h, k]
    pool: Array  # pooled key of the online segment [b, h, k]
    length: Array  # number of unmasked tokens of the online segment, int32 [b]
    slot: Array  # index of the online segment, int32 [b]; NO_SLOT with buckets
    position: Array  # number of processed tokens, including masked ones, int32 [b]
    capacity: Array  # maximum number of tokens, int32 []; NOT_STREAMABLE if it cannot be extended
    conv: Weights = ()  # last inputs of the convolutions of q, k and v, each [b, width - 1, d]
    # Product of the online segment's retention [b, h]; () unless buckets sum states.
    retention: MaybeArray = ()

    @property
    def segments(self) -> Segments:
        """Memory, pooled key and length of all segments, including the online one; or of buckets.

        Unused slots are zero. A cache from `init_cache` has no slots if reads do not use them:
        under `none`, and under `residual` and `mean` if reads are linear in the weights.
        """
        if not self.stored.length.shape[1] or len(self.stored.pool_sum):
            return self.stored
        online = Segments(self.state.weights, self.pool, self.length)
        return write_slots(self.stored, add_axis(online), self.slot[:, None])

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads h and head width k."""
        return tuple(self.pool.shape[1:])

    def take(self, rows: Rows) -> "Cache":
        """Return a cache with the streams of the given rows; see `take_rows`."""
        return take_rows(self, rows)


class KVCache(NamedTuple):
    """State of the streams of an attention layer. Rows are independent.

    The token at position p is stored in slot p % n of n.
    """

    keys: Array  # keys after the rotary embedding [b, n, h, k]
    values: Array  # [b, n, h, v]
    mask: Array  # bool [b, n], False at empty slots and masked tokens
    position: Array  # number of processed tokens, including masked ones, int32 [b]
    capacity: Array  # maximum number of tokens, int32 []
    conv: Weights = ()  # last inputs of the convolutions of q, k and v, each [b, width - 1, d]

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads of keys and values, and head width k."""
        return tuple(self.keys.shape[2:])

    def take(self, rows: Rows) -> "KVCache":
        """Return a cache with the streams of the given rows; see `take_rows`."""
        return take_rows(self, rows)


AnyCache = Cache | KVCache | LevelCache


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: weights W_0 per layer, each [h, o, i].
        k: keys [..., h, c, k]; they determine leading axes, device and dtype of the state.
        v: values [..., h, c, v].
    """
    dtype = state_dtype(k.dtype)
    # The zeros are derived from the inputs, so that the carry of a scan has the inputs' sharding.
    zero = jnp.zeros_like(k[..., :1, :1], dtype=dtype)
    weights = tuple(
        w.astype(dtype).reshape((1,) * (zero.ndim - 3) + w.shape) + zero
        for w in memory.prepare(initial)
    )
    momentum = jax.tree.map(jnp.zeros_like, weights) if memory.config.has_momentum else ()
    previous: Weights = ()
    if memory.config.uses_previous_token:
        previous = tuple(jnp.zeros_like(x[..., 0, :], dtype=dtype) for x in (k, v))
    return MemoryState(
        weights,
        momentum,
        anchor=weights if memory.config.gradient_uses_weights else (),
        previous=previous,
        retention=1 + zero[..., 0, 0] if memory.config.updates_at_chunk_end else (),
    )


def init_cache(
    initial: Weights,
    config: MCConfig,
    batch: int,
    max_tokens: int,
    *,
    dtype: Dtype = None,
    cache_dtype: Dtype = None,
    cache_device: str = "device",
) -> Cache:
    """Return an empty cache.

    Args:
        initial: weights W_0 per layer, each [h, out, in].
        config: the layer's configuration, with `constant` or `fenwick` segments.
        batch: number of streams, 0 or more.
        max_tokens: capacity, the maximum number of tokens per stream.
        dtype: dtype of q, k and v; None = that of `initial`.
        cache_dtype: dtype of the cached memories; None = that of the online memory (float32 or
            wider).
        cache_device: storage of cached memories: `device` or `host`. Reads copy memories from the
            host to the device (under `ssc` only the selected ones).

    Raises:
        ValueError: an argument is out of range, the segments cannot stream, or the device has no
            host memory.
    """
    check_streaming_config(config)
    check_cache_options(batch, max_tokens, cache_device)
    memory = make_memory(config.memory)
    h, width = config.num_heads, initial[0].shape[-1]
    dtype = dtype or initial[0].dtype
    k = jnp.zeros((batch, h, width), dtype)
    v = jnp.zeros((batch, h, initial[-1].shape[-2]), dtype)
    start = start_state(memory, initial, k[..., None, :], v[..., None, :])
    slots = config.slots(max_tokens)
    cache = empty_cache(start, k, config, slots, max_tokens, config.reads_sum, cache_dtype)
    # Copy, so that no two leaves share a buffer and the cache can be donated.
    cache = jax.tree.map(jnp.copy, cache)
    if cache_device == "device":
        return cache
    offloaded = jax.tree.map(move_to_host, cache.stored.weights)
    return cache._replace(stored=cache.stored._replace(weights=offloaded))


def grow(cache: Cache, config: MCConfig, max_tokens: int) -> Cache:
    """Return a cache with the same content and a larger capacity.

    Raises:
        ValueError: `max_tokens` is less than the current capacity.
    """
    check_growth(cache, max_tokens)
    stored = add_slots(cache.stored, config.slots(max_tokens))
    return cache._replace(stored=stored, capacity=jnp.full_like(cache.capacity, max_tokens))


def add_slots(stored: Tree, slots: int) -> Tree:
    """Pad arrays [b, n, ...] with zeros to at least `slots` slots."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, max(slots - x.shape[1], 0)), *[(0, 0)] * (x.ndim - 2)])

    return jax.tree.map(partial(update_in_place, pad), stored)


def cast_cache(cache: Cache, dtype: Dtype) -> Cache:
    """Cast the state of a stream; cached memories keep their dtype."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    return cache._replace(
        stored=cache.stored._replace(
            pool=cast(cache.stored.pool),
            pool_sum=cast(cache.stored.pool_sum),
            retention=cast(cache.stored.retention),
        ),
        total=cast(cache.total),
        state=cast(cache.state),
        pool_sum=cast(cache.pool_sum),
        pool=cast(cache.pool),
        retention=cast(cache.retention),
    )


def check_growth(cache: AnyCache, max_tokens: int) -> None:
    """Check that `grow` does not shrink a cache. No-op in a compiled program.

    Raises:
        ValueError: the new capacity is smaller, or the cache cannot be extended.
    """
    if not is_traced(cache.capacity):
        cache_checks.check_growth(int(cache.capacity), max_tokens)


def check_capacity(cache: AnyCache, tokens: int | Array) -> None:
    """Check that a cache has capacity for the next tokens. No-op in a compiled program.

    Args:
        cache: state before these tokens.
        tokens: number of next tokens, of all rows or [b].

    Raises:
        ValueError: the capacity is exceeded, or the cache cannot be extended.
    """
    if is_traced(cache.position) or is_traced(tokens):
        return
    cache_checks.check_capacity(np.asarray(cache.position), np.asarray(tokens), int(cache.capacity))


def nan_past_capacity(y: Array, after: AnyCache) -> Array:
    """Return outputs [b, t, h, v], NaN in rows past the capacity and in invalidated rows."""
    capacity = jnp.minimum(after.capacity, INVALIDATED - 1)
    within_capacity = (after.position <= capacity)[:, None, None, None]
    return jnp.where(within_capacity, y, jnp.full_like(y, jnp.nan))


def is_traced(x: Any) -> bool:
    """Return True if a value is traced, so that it is unknown in Python."""
    return isinstance(x, jax.core.Tracer)


def empty_cache(
    start: MemoryState,
    k: Array,
    config: MCConfig,
    slots: int,
    capacity: int,
    total: bool,
    dtype: Dtype = None,
) -> Cache:
    """Return the cache before the first token.

    Args:
        start: the state before the first token [b, h, ...].
        k: keys [b, h, k]; they determine the shape of the pooled keys.
        config: the layer's configuration.
        slots: number of slots for cached memories.
        capacity: maximum number of tokens per stream.
        total: if True, the cache has the sum of the complete segments' weights.
        dtype: dtype of the cached memories; None = that of the state.
    """
    zero = jnp.zeros_like(k, dtype=state_dtype(k.dtype))
    count = jnp.zeros_like(k[:, 0, 0], dtype=jnp.int32)

    def stack(x: Array) -> Array:
        return jnp.repeat(jnp.zeros_like(x)[:, None], slots, axis=1)

    return Cache(
        stored=Segments(
            weights=tuple(stack(w.astype(dtype or w.dtype)) for w in start.weights),
            pool=stack(zero),
            length=stack(count),
            pool_sum=stack(zero) if config.has_buckets else (),
            retention=stack(zero[..., 0]) if config.sums_states else (),
        ),
        total=jax.tree.map(jnp.zeros_like, start.weights) if total else (),
        state=start,
        pool_sum=zero,
        pool=zero,
        length=count,
        slot=jnp.full_like(count, NO_SLOT) if config.has_buckets else count,
        position=count,
        capacity=jnp.asarray(capacity, jnp.int32),
        retention=jnp.ones_like(zero[..., 0]) if config.sums_states else (),
    )


def sum_complete(config: MCConfig, weights: Weights, plan: Plan) -> Weights:
    """Return the sum of complete segments' weights [b, h, o, i]; () if no read uses it.

    Args:
        config: the layer's configuration.
        weights: memories of all segments, each [b, n, h, o, i].
        plan: the segments, of which the last may be incomplete.
    """
    if not config.reads_sum:
        return ()
    return tuple(jnp.sum(w[:, : plan.complete], axis=1) for w in weights)


def write_slots(stored: Tree, new: Tree, slots: Array) -> Tree:
    """Write `new` [b, s, ...] to slots [b, s] of `stored` [b, n, ...]; slots >= n are dropped."""
    row = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]

    def write(stored_leaf: Array, new_leaf: Array) -> Array:
        new_leaf = new_leaf.astype(stored_leaf.dtype)
        if slots.shape[1] > 1 or on_host(stored_leaf):
            return update_in_place(_scatter_slots, stored_leaf, new_leaf, slots, row)
        return _update_slot(stored_leaf, new_leaf, slots)

    return jax.tree.map(write, stored, new)


def _scatter_slots(stored_leaf: Array, new_leaf: Array, slots: Array, row: Array) -> Array:
    return stored_leaf.at[row, slots].set(new_leaf, mode="drop")


@jax.vmap
def _update_slot(stored_leaf: Array, new_leaf: Array, slot: Array) -> Array:
    # Out of range, write the old value, because XLA copies all slots for mode="drop".
    slot, inside = jnp.minimum(slot[0], len(stored_leaf) - 1), slot[0] < len(stored_leaf)
    old = jax.lax.dynamic_index_in_dim(stored_leaf, slot)
    return jax.lax.dynamic_update_index_in_dim(
        stored_leaf, jnp.where(inside, new_leaf, old), slot, 0
    )


def add_axis(tree: Tree) -> Tree:
    """Insert an axis of length 1 after the first axis of arrays [b, ...]."""
    return jax.tree.map(lambda x: x[:, None], tree)


def tree_where(condition: Array, on_true: Tree, on_false: Tree) -> Tree:
    """`where` for trees; `condition` [b] or [b, r] matches the leading axes of the leaves."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(pick, on_true, on_false)
