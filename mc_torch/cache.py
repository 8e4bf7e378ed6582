"""The streaming state of a layer's memories: an immutable tree, valid between any two tokens."""

from typing import Any, NamedTuple

import torch

from mc_core import cache_checks
from mc_core.cache_checks import ENDED, check_cache_options
from mc_core.config import MCConfig
from mc_core.segmentation import check_streams
from mc_torch.backends import Memory, MemoryState, Weights, make_memory
from mc_torch.gates import pooled
from mc_torch.host import move_to_host, put
from mc_torch.layout import TensorPlan
from mc_torch.numerics import Array, Dtype, is_batched, state_dtype, tree_map
from mc_torch.rows import Rows, take_rows

Tree = Any  # nested tuples of tensors


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copy(self, memo)


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _copy(self, memo)


AnyCache = Cache | KVCache

# `torch.load(..., weights_only=True)` reads a cache that `torch.save` wrote.
torch.serialization.add_safe_globals([Cache, KVCache, MemoryState, Segments])


def start_state(memory: Memory, initial: Weights, k: Array, v: Array) -> MemoryState:
    """Return the state before the first token.

    Args:
        memory: the memory kind.
        initial: W_0, first layer first, each [h, o, i].
        k: keys [..., h, c, k]; the state's leading axes, device and dtype come from them.
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
        ValueError: a number is out of range, or the segments cannot stream.
    """
    check_streams(config)
    check_cache_options(batch, max_tokens, cache_device)
    memory = make_memory(config.memory)
    h, width = config.num_heads, initial[0].shape[-1]
    dtype, device = dtype or initial[0].dtype, initial[0].device
    k = torch.zeros(batch, h, width, dtype=dtype, device=device)
    v = torch.zeros(batch, h, initial[-1].shape[-2], dtype=dtype, device=device)
    start = start_state(memory, initial, k[..., None, :], v[..., None, :])
    slots = config.slots(max_tokens)
    cache = empty_cache(start, k, slots, max_tokens, config.reads_sum, cache_dtype)
    # A sum of keys is its own pool, one tensor at two places, as after every step.
    pool = pooled(cache.pool_sum, cache.length[:, None], config.pooling)
    cache = cache._replace(pool=pool)
    if cache_device == "device":
        return cache
    far = tree_map(move_to_host, cache.stored.weights)
    return cache._replace(stored=cache.stored._replace(weights=far))


def grow(cache: Cache, config: MCConfig, max_tokens: int) -> Cache:
    """Return a cache with the same content and room for `max_tokens` tokens.

    Raises:
        ValueError: that is less than it has room for now.
    """
    check_growth(cache, max_tokens)
    stored = add_slots(cache.stored, config.slots(max_tokens))
    return cache._replace(stored=stored, limit=torch.full_like(cache.limit, max_tokens))


def add_slots(stored: Tree, slots: int) -> Tree:
    """Return tensors [b, n, ...] with `slots` slots, or as many as they have; new ones are zero."""

    def pad(x: Array) -> Array:
        more = x.new_zeros(x.shape[0], max(slots - x.shape[1], 0), *x.shape[2:])
        return torch.cat([x, more], dim=1)

    return tree_map(pad, stored)


def in_dtype(cache: Cache, dtype: Dtype) -> Cache:
    """Cast what a stream computes with; cached memories keep the dtype that they are stored in."""

    def cast(tree: Tree) -> Tree:
        return tree_map(lambda x: x.to(dtype), tree)

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
    number = tokens.tolist() if isinstance(tokens, Array) else tokens
    cache_checks.check_room(cache.position.tolist(), number, int(cache.limit))


def in_room(y: Array, after: AnyCache) -> Array:
    """Return outputs [b, t, h, v], NaN in rows past the limit of the cache after them, or ended."""
    limit = after.limit.clamp(max=ENDED - 1)
    room = (after.position <= limit)[:, None, None, None]
    return torch.where(room, y, torch.nan)


def is_traced(x: Any) -> bool:
    """Whether a value is known only to the compiled program, or differs under `torch.vmap`."""
    return torch.compiler.is_compiling() or (isinstance(x, Array) and is_batched(x))


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
    zero = torch.zeros_like(k, dtype=state_dtype(k.dtype))
    count = torch.zeros_like(k[:, 0, 0], dtype=torch.int32)

    def stack(x: Array) -> Array:
        return x.new_zeros(x.shape[0], slots, *x.shape[1:])

    # No tensor stands at two places: a step compiled for that would be compiled anew for the next.
    return Cache(
        stored=Segments(
            weights=tuple(stack(w.to(dtype or w.dtype)) for w in start.weights),
            pool=stack(zero),
            length=stack(count),
        ),
        total=tree_map(torch.zeros_like, start.weights) if total else (),
        state=start._replace(anchor=tree_map(torch.clone, start.anchor)),
        pool_sum=zero,
        pool=zero.clone(),
        length=count,
        slot=count.clone(),
        position=count.clone(),
        limit=torch.full((), limit, dtype=torch.int32, device=k.device),
    )


def sum_complete(config: MCConfig, weights: Weights, plan: TensorPlan) -> Weights:
    """Return the sum of complete segments' weights [b, h, o, i], where reads take it.

    Args:
        config: the layer's configuration.
        weights: of all segments, each [b, n, h, o, i].
        plan: the segments; of those that `config` cuts the last may be incomplete.
    """
    if not config.reads_sum:
        return ()
    complete = plan.segments - (plan.lengths[-1] < plan.full_length)
    return tuple(torch.sum(w[:, :complete], dim=1) for w in weights)


def put_slots(stored: Tree, new: Tree, slots: Array) -> Tree:
    """Write `new` [b, s, ...] into the slots [b, s] of `stored` [b, n, ...]; none where it is n."""
    number = torch.arange(stored[-1].shape[1], dtype=slots.dtype, device=slots.device)
    here = slots[:, None, :] == number[:, None]  # [b, n, s]
    # The caller still holds what is stored, so a write copies it all: not at every token's price.
    if not is_traced(slots) and not here.any():
        return stored
    row = torch.arange(slots.shape[0], device=slots.device)[:, None]
    written, which = here.any(dim=-1), here.to(torch.uint8).argmax(dim=-1)

    def choose_new(all_: Array, some: Array, written: Array) -> Array:
        return choose(written, some, all_)

    def write(all_: Array, some: Array) -> Array:
        some = some if some.shape[1] == 1 else some[row, which]
        return put(choose_new, all_, some.to(all_.dtype), written)

    return tree_map(write, stored, new)


def add_axis(tree: Tree) -> Tree:
    """Give the tensors [b, ...] of a tree an axis of length 1 after the first."""
    return tree_map(lambda x: x[:, None], tree)


def choose(condition: Array, yes: Tree, no: Tree) -> Tree:
    """Select whole states, or other trees; `condition` [b] or [b, r] matches their leading axes."""

    def pick(a: Array, b: Array) -> Array:
        return torch.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return tree_map(pick, yes, no)


def _copy(cache: AnyCache, memo: dict[int, Any]) -> AnyCache:
    """Copy a cache for `copy.deepcopy`, detached: PyTorch copies no result of a graph."""

    def copy(x: Array) -> Array:
        if id(x) not in memo:
            memo[id(x)] = x.detach().clone()
        return memo[id(x)]

    return tree_map(copy, cache)
