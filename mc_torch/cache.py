"""Streaming state of a layer after any token."""

from typing import Any, NamedTuple

import torch

from mc_core import cache_checks
from mc_core.cache_checks import INVALIDATED, NO_SLOT, check_cache_options
from mc_core.config import MCConfig
from mc_core.segmentation import check_streaming_config
from mc_torch.backends import Memory, MemoryState, Weights, make_memory
from mc_torch.cache_rows import Rows, take_rows
from mc_torch.chunk_layout import TensorPlan
from mc_torch.gates import finish_pooling
from mc_torch.level_cache import LevelCache
from mc_torch.numerics import Array, Dtype, is_batched, state_dtype, tree_map
from mc_torch.offload import move_to_host, update_in_place

Tree = Any  # nested tuples of tensors
MaybeArray = Any  # a tensor; () if unused


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copy(self, memo)


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copy(self, memo)


AnyCache = Cache | KVCache | LevelCache

# `torch.load(..., weights_only=True)` reads a cache that `torch.save` wrote.
torch.serialization.add_safe_globals([Cache, KVCache, MemoryState, Segments])


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: weights W_0 per layer, each [h, o, i].
        k: keys [..., h, c, k]; they determine leading axes, device and dtype of the state.
        v: values [..., h, c, v].
    """
    dtype = state_dtype(k.dtype)
    weights = tuple(
        w.to(dtype).expand(*k.shape[:-3], *w.shape).clone() for w in memory.prepare(initial)
    )
    momentum = tree_map(torch.zeros_like, weights) if memory.config.has_momentum else ()
    previous: Weights = ()
    if memory.config.uses_previous_token:
        previous = tuple(torch.zeros_like(x[..., 0, :], dtype=dtype) for x in (k, v))
    return MemoryState(
        weights,
        momentum,
        anchor=weights if memory.config.gradient_uses_weights else (),
        previous=previous,
        retention=(
            torch.ones_like(weights[0][..., 0, 0]) if memory.config.updates_at_chunk_end else ()
        ),
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
        ValueError: an argument is out of range, or the segments cannot stream.
    """
    check_streaming_config(config)
    check_cache_options(batch, max_tokens, cache_device)
    memory = make_memory(config.memory)
    h, width = config.num_heads, initial[0].shape[-1]
    dtype, device = dtype or initial[0].dtype, initial[0].device
    k = torch.zeros(batch, h, width, dtype=dtype, device=device)
    v = torch.zeros(batch, h, initial[-1].shape[-2], dtype=dtype, device=device)
    start = start_state(memory, initial, k[..., None, :], v[..., None, :])
    slots = config.slots(max_tokens)
    cache = empty_cache(start, k, config, slots, max_tokens, config.reads_sum, cache_dtype)
    # With `pooling="sum"`, `pool` and `pool_sum` are the same tensor, as after every step.
    pool = finish_pooling(cache.pool_sum, cache.length[:, None], config)
    cache = cache._replace(pool=pool)
    if cache_device == "device":
        return cache
    offloaded = tree_map(move_to_host, cache.stored.weights)
    return cache._replace(stored=cache.stored._replace(weights=offloaded))


def grow(cache: Cache, config: MCConfig, max_tokens: int) -> Cache:
    """Return a cache with the same content and a larger capacity.

    Raises:
        ValueError: `max_tokens` is less than the current capacity.
    """
    check_growth(cache, max_tokens)
    stored = add_slots(cache.stored, config.slots(max_tokens))
    return cache._replace(stored=stored, capacity=torch.full_like(cache.capacity, max_tokens))


def add_slots(stored: Tree, slots: int) -> Tree:
    """Pad tensors [b, n, ...] with zeros to at least `slots` slots."""

    def pad(x: Array) -> Array:
        more = x.new_zeros(x.shape[0], max(slots - x.shape[1], 0), *x.shape[2:])
        return torch.cat([x, more], dim=1)

    return tree_map(pad, stored)


def cast_cache(cache: Cache, dtype: Dtype) -> Cache:
    """Cast the state of a stream; cached memories keep their dtype."""

    def cast(tree: Tree) -> Tree:
        return tree_map(lambda x: x.to(dtype), tree)

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
    number = tokens.tolist() if isinstance(tokens, Array) else tokens
    cache_checks.check_capacity(cache.position.tolist(), number, int(cache.capacity))


def nan_past_capacity(y: Array, after: AnyCache) -> Array:
    """Return outputs [b, t, h, v], NaN in rows past the capacity and in invalidated rows."""
    capacity = after.capacity.clamp(max=INVALIDATED - 1)
    within_capacity = (after.position <= capacity)[:, None, None, None]
    return torch.where(within_capacity, y, torch.nan)


def is_traced(x: Any) -> bool:
    """Return True if a value is unknown: while compiling, or batched by `torch.vmap`."""
    return torch.compiler.is_compiling() or (isinstance(x, Array) and is_batched(x))


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
    zero = torch.zeros_like(k, dtype=state_dtype(k.dtype))
    count = torch.zeros_like(k[:, 0, 0], dtype=torch.int32)

    def stack(x: Array) -> Array:
        return x.new_zeros(x.shape[0], slots, *x.shape[1:])

    one_per_head = zero[..., 0]
    # No two leaves share a tensor: a step compiled for shared leaves would be compiled again.
    return Cache(
        stored=Segments(
            weights=tuple(stack(w.to(dtype or w.dtype)) for w in start.weights),
            pool=stack(zero),
            length=stack(count),
            pool_sum=stack(zero) if config.has_buckets else (),
            retention=stack(one_per_head) if config.sums_states else (),
        ),
        total=tree_map(torch.zeros_like, start.weights) if total else (),
        state=start._replace(anchor=tree_map(torch.clone, start.anchor)),
        pool_sum=zero,
        pool=zero.clone(),
        length=count,
        slot=torch.full_like(count, NO_SLOT) if config.has_buckets else count.clone(),
        position=count.clone(),
        capacity=torch.full((), capacity, dtype=torch.int32, device=k.device),
        retention=torch.ones_like(one_per_head) if config.sums_states else (),
    )


def sum_complete(config: MCConfig, weights: Weights, plan: TensorPlan) -> Weights:
    """Return the sum of complete segments' weights [b, h, o, i]; () if no read uses it.

    Args:
        config: the layer's configuration.
        weights: memories of all segments, each [b, n, h, o, i].
        plan: the segments, of which the last may be incomplete.
    """
    if not config.reads_sum:
        return ()
    return tuple(torch.sum(w[:, : plan.complete], dim=1) for w in weights)


def write_slots(stored: Tree, new: Tree, slots: Array) -> Tree:
    """Write `new` [b, s, ...] to slots [b, s] of `stored` [b, n, ...]; slots >= n are dropped."""
    number = torch.arange(stored[1].shape[1], dtype=slots.dtype, device=slots.device)
    matches = slots[:, None, :] == number[:, None]  # [b, n, s]
    # A write copies all slots, because the caller may still use the old cache: skip empty writes.
    if not is_traced(slots) and not matches.any():
        return stored
    row = torch.arange(slots.shape[0], device=slots.device)[:, None]
    write_mask, which = matches.any(dim=-1), matches.to(torch.uint8).argmax(dim=-1)

    def choose_new(stored_leaf: Array, new_leaf: Array, write_mask: Array) -> Array:
        return tree_where(write_mask, new_leaf, stored_leaf)

    def write(stored_leaf: Array, new_leaf: Array) -> Array:
        new_leaf = new_leaf if new_leaf.shape[1] == 1 else new_leaf[row, which]
        return update_in_place(choose_new, stored_leaf, new_leaf.to(stored_leaf.dtype), write_mask)

    return tree_map(write, stored, new)


def add_axis(tree: Tree) -> Tree:
    """Insert an axis of length 1 after the first axis of tensors [b, ...]."""
    return tree_map(lambda x: x[:, None], tree)


def tree_where(condition: Array, on_true: Tree, on_false: Tree) -> Tree:
    """`where` for trees; `condition` [b] or [b, r] matches the leading axes of the leaves."""

    def pick(a: Array, b: Array) -> Array:
        return torch.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return tree_map(pick, on_true, on_false)


def _copy(cache: AnyCache, memo: dict[int, Any]) -> AnyCache:
    """Copy a cache for `copy.deepcopy`, detached: PyTorch cannot deep-copy non-leaf tensors."""

    def copy(x: Array) -> Array:
        if id(x) not in memo:
            memo[id(x)] = x.detach().clone()
        return memo[id(x)]

    return tree_map(copy, cache)
