"""The streaming state of a layer's memories: an immutable tree, valid between any two tokens."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mc_core import cache_checks
from mc_core.cache_checks import ENDED, check_cache_options
from mc_core.config import MCConfig
from mc_core.segmentation import Plan, check_streams
from mc_jax.backends import Memory, MemoryState, Weights, make_memory
from mc_jax.host import move_to_host, on_host, put
from mc_jax.numerics import Array, Dtype, state_dtype
from mc_jax.rows import Rows, take_rows

Tree = Any  # nested tuples of arrays


class Segments(NamedTuple):
    """The memory of every segment after its last token so far (section 4)."""

    weights: Weights  # first layer first, each [b, n, h, o, i]
    pool: Array  # pooled keys m [b, n, h, k]
    length: Array  # real tokens of the segment, int32 [b, n]


class Cache(NamedTuple):
    """All that the next token needs to know of the ones before it; every row by itself."""

    stored: Segments  # complete segments, in slots; read the online one's through `segments`
    total: Weights  # sum of the complete segments' weights, where one read of it is enough
    state: MemoryState  # the online memory
    pool_sum: Array  # sum of the online segment's keys [b, h, k]
    pool: Array  # its pooled key [b, h, k]
    length: Array  # its real tokens, int32 [b]
    slot: Array  # which segment it is, int32 [b]
    position: Array  # tokens so far, masked ones included, int32 [b]
    limit: Array  # tokens that there is room for, int32 []; NO_STREAM where none may follow
    conv: Weights = ()  # what q, k and v were before a layer's convolutions, each [b, width - 1, d]

    @property
    def segments(self) -> Segments:
        """Every segment's memory, pooled key and length, the online segment's as they are now.

        Slots to come are zero. There are no slots where no read needs them: under `none`, and under
        `residual` and `mean` with matrix memories that are not normalised, in a cache of
        `init_cache`.
        """
        if not self.stored.length.shape[1]:
            return self.stored
        online = Segments(self.state.weights, self.pool, self.length)
        return put_slots(self.stored, add_axis(online), self.slot[:, None])

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads h, and their width k."""
        return tuple(self.pool.shape[1:])

    def take(self, rows: Rows) -> "Cache":
        """Return the streams of some rows, in any order and any number; see `take_rows`."""
        return take_rows(self, rows)


class KVCache(NamedTuple):
    """Keys and values of the tokens that the next ones may see; every row by itself.

    The token at position p lies in slot p % n of n.
    """

    keys: Array  # turned to their positions [b, n, h, k]
    values: Array  # [b, n, h, v]
    real: Array  # bool [b, n], False where no token, or a masked one, is
    position: Array  # tokens so far, masked ones included, int32 [b]
    limit: Array  # tokens that there is room for, int32 []
    conv: Weights = ()  # what q, k and v were before a layer's convolutions, each [b, width - 1, d]

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads h, and their width k."""
        return tuple(self.keys.shape[2:])

    def take(self, rows: Rows) -> "KVCache":
        """Return the streams of some rows, in any order and any number; see `take_rows`."""
        return take_rows(self, rows)


AnyCache = Cache | KVCache


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: W_0, first layer first, each [h, o, i].
        k: keys [..., h, c, k]; the state's leading axes, device placement and dtype come from them.
        v: values [..., h, c, v].
    """
    dtype = state_dtype(k.dtype)
    # Derived from the inputs, so that a scan's carry keeps their sharding.
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
        weights, momentum, weights if memory.config.gradient_uses_weights else (), previous
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
    """Return the cache of streams that have not begun, with room for `max_tokens` tokens each.

    Args:
        initial: W_0, first layer first, each [h, out, in].
        config: the layer's configuration, with segments of constant size.
        batch: number of streams, 0 or more.
        max_tokens: the most tokens that a stream may have.
        dtype: of q, k and v; None = that of `initial`.
        cache_dtype: of the cached memories; None = that of the online one, at least float32.
        cache_device: `device`, or `host`: the cached memories lie in the host's memory, and a call
            moves what it reads (under `ssc` the selected ones alone).

    Raises:
        ValueError: a number is out of range, the segments cannot stream, or the device has no such
            memory.
    """
    check_streams(config)
    check_cache_options(batch, max_tokens, cache_device)
    memory = make_memory(config.memory)
    h, width = config.num_heads, initial[0].shape[-1]
    dtype = dtype or initial[0].dtype
    k = jnp.zeros((batch, h, width), dtype)
    v = jnp.zeros((batch, h, initial[-1].shape[-2]), dtype)
    start = start_state(memory, initial, k[..., None, :], v[..., None, :])
    slots = config.slots(max_tokens)
    cache = empty_cache(start, k, slots, max_tokens, config.reads_sum, cache_dtype)
    # Leaves of their own, so that the cache may be donated to a compiled step.
    cache = jax.tree.map(jnp.copy, cache)
    if cache_device == "device":
        return cache
    far = jax.tree.map(move_to_host, cache.stored.weights)
    return cache._replace(stored=cache.stored._replace(weights=far))


def grow(cache: Cache, config: MCConfig, max_tokens: int) -> Cache:
    """Return a cache with the same content and room for `max_tokens` tokens.

    Raises:
        ValueError: that is less than it has room for now.
    """
    check_growth(cache, max_tokens)
    stored = add_slots(cache.stored, config.slots(max_tokens))
    return cache._replace(stored=stored, limit=jnp.full_like(cache.limit, max_tokens))


def add_slots(stored: Tree, slots: int) -> Tree:
    """Return arrays [b, n, ...] with `slots` slots, or as many as they have; new ones are zero."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, max(slots - x.shape[1], 0)), *[(0, 0)] * (x.ndim - 2)])

    return jax.tree.map(partial(put, pad), stored)


def in_dtype(cache: Cache, dtype: Dtype) -> Cache:
    """Cast what a stream computes with; cached memories keep the dtype that they are stored in."""

    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    return cache._replace(
        stored=cache.stored._replace(pool=cast(cache.stored.pool)),
        total=cast(cache.total),
        state=cast(cache.state),
        pool_sum=cast(cache.pool_sum),
        pool=cast(cache.pool),
    )


def check_growth(cache: AnyCache, max_tokens: int) -> None:
    """Refuse a room that is less than a cache has; says nothing inside of a compiled program.

    Raises:
        ValueError: names both, or the segments are not those of a stream.
    """
    if not is_traced(cache.limit):
        cache_checks.check_growth(int(cache.limit), max_tokens)


def check_room(cache: AnyCache, tokens: int | Array) -> None:
    """Refuse tokens that a cache has no room for; says nothing inside of a compiled program.

    Args:
        cache: the streams so far.
        tokens: to come, for all rows or [b].

    Raises:
        ValueError: names the position, and what to do, or the segments are not those of a stream.
    """
    if is_traced(cache.position) or is_traced(tokens):
        return
    cache_checks.check_room(np.asarray(cache.position), np.asarray(tokens), int(cache.limit))


def in_room(y: Array, after: AnyCache) -> Array:
    """Return outputs [b, t, h, v], NaN in rows past the limit of the cache after them, or ended."""
    limit = jnp.minimum(after.limit, ENDED - 1)
    room = (after.position <= limit)[:, None, None, None]
    return jnp.where(room, y, jnp.full_like(y, jnp.nan))


def is_traced(x: Any) -> bool:
    """Whether a value is known only to the compiled program."""
    return isinstance(x, jax.core.Tracer)


def empty_cache(
    start: MemoryState, k: Array, slots: int, limit: int, total: bool, dtype: Dtype = None
) -> Cache:
    """Return the cache before the first token.

    Args:
        start: the state before the first token [b, h, ...].
        k: keys [b, h, k], which give the shapes of their pools.
        slots: memories that it will hold.
        limit: tokens that it will have room for.
        total: whether the sum of complete segments is kept.
        dtype: of stored memories; None = that of the state.
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
        ),
        total=jax.tree.map(jnp.zeros_like, start.weights) if total else (),
        state=start,
        pool_sum=zero,
        pool=zero,
        length=count,
        slot=count,
        position=count,
        limit=jnp.asarray(limit, jnp.int32),
    )


def sum_complete(config: MCConfig, weights: Weights, plan: Plan) -> Weights:
    """Return the sum of complete segments' weights [b, h, o, i], where reads take it.

    Args:
        config: the layer's configuration.
        weights: of all segments, each [b, n, h, o, i].
        plan: the segments; of those that `config` cuts the last may be incomplete.
    """
    if not config.reads_sum:
        return ()
    complete = plan.segments - (plan.lengths[-1] < plan.full_length)
    return tuple(jnp.sum(w[:, :complete], axis=1) for w in weights)


def put_slots(stored: Tree, new: Tree, slots: Array) -> Tree:
    """Write `new` [b, s, ...] into the slots [b, s] of `stored` [b, n, ...]; none where it is n."""
    row = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]

    def write(all_: Array, some: Array) -> Array:
        some = some.astype(all_.dtype)
        if slots.shape[1] > 1 or on_host(all_):
            return put(_put_many, all_, some, slots, row)
        return _put_one(all_, some, slots)

    return jax.tree.map(write, stored, new)


def _put_many(all_: Array, some: Array, slots: Array, row: Array) -> Array:
    return all_.at[row, slots].set(some, mode="drop")


@jax.vmap
def _put_one(all_: Array, some: Array, slot: Array) -> Array:
    # Always a write, at times of what is there: to drop one, XLA would copy all slots.
    slot, inside = jnp.minimum(slot[0], len(all_) - 1), slot[0] < len(all_)
    old = jax.lax.dynamic_index_in_dim(all_, slot)
    return jax.lax.dynamic_update_index_in_dim(all_, jnp.where(inside, some, old), slot, 0)


def add_axis(tree: Tree) -> Tree:
    """Give the arrays [b, ...] of a tree an axis of length 1 after the first."""
    return jax.tree.map(lambda x: x[:, None], tree)


def choose(condition: Array, yes: Tree, no: Tree) -> Tree:
    """Select whole states, or other trees; `condition` [b] or [b, r] matches their leading axes."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(pick, yes, no)
