"""Next tokens, one after another: prompts in chunks, then one compiled step a token."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.generation import (
    PROMPT_BLOCK,
    Block,
    bucket,
    check_generation,
    check_sampling,
    make_blocks,
)
from mc_jax.cache import AnyCache
from mc_jax.model import LanguageModel
from mc_jax.numerics import Array, Dtype, state_dtype


def sample(
    logits: Array,
    rng: Array | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Array:
    """Choose a token from the logits of each row.

    The logits are divided by the temperature; of these `top_k` remain, and of those the fewest
    whose probabilities add up to `top_p`. Of equal logits the lower id goes first.

    Args:
        logits: [b, vocab_size].
        rng: keys [b], one a row; a row's draw depends on its own. None where the temperature is 0.
        temperature: 0 takes the largest logit.
        top_k: keep so many; None = all.
        top_p: keep this probability, in (0, 1]; None = all.

    Returns:
        ids [b], int32; -1 where the largest logit is not finite.

    Raises:
        ValueError: an option out of range, or no `rng` where one is needed.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.astype(state_dtype(logits.dtype))
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    elif rng is None:
        raise ValueError(f"rng = None: must be given where temperature = {temperature}")
    else:
        ranked, order = _truncate(logits / temperature, top_k, top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, ranked.shape[1:], ranked.dtype))(rng)
        choice = jnp.argmax(ranked + noise, axis=-1)
        tokens = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    return jnp.where(finite, tokens, -1).astype(jnp.int32)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    cache_dtype: Dtype = None,
    cache_device: str = "device",
    block: int = PROMPT_BLOCK,
) -> Iterator[Array]:
    """Go on with prompts; every row gives what it gives alone.

    All is compiled before this returns, once for a number of rows, a width of a block and a power
    of two of tokens. The step after a token is under way when the token comes out.

    Args:
        model: the language model; its segments must stream.
        prompts: ids of each row, one or more; of no rows every step is empty.
        max_new_tokens: the most tokens that come out; a caller may stop before.
        temperature: as `sample` takes it, like top_k and top_p.
        top_k: as above.
        top_p: as above.
        seed: of all random streams.
        rows: the number of each row, which tells its random stream from the others'; None = 0, 1...
        cache_dtype: of the cached memories; None = that of the online one.
        cache_device: where the cached memories lie, `device` or `host`.
        block: the most tokens of the prompts that are read at once; at 1 only the step that every
            later token takes is compiled.

    Returns:
        An iterator of the next id of each row, int32 [b]; -1 as `sample` gives it.

    Raises:
        ValueError: an argument out of range, or segments that cannot stream.
    """
    rows = range(len(prompts)) if rows is None else rows
    b, vocab_size = len(prompts), model.config.vocab_size
    check_sampling(temperature, top_k, top_p)
    check_generation(prompts, vocab_size, max_new_tokens, seed, rows, block)
    if not b:
        return iter([jnp.zeros(0, jnp.int32)] * max_new_tokens)
    room = bucket(max(map(len, prompts)) + max_new_tokens)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    start, extend = _make_programs(graphdef)
    stream = np.uint32(seed), np.asarray(rows, np.uint32)
    cache, last, keys = start(
        params, *stream, room=room, cache_dtype=cache_dtype, cache_device=cache_device
    )
    cache, last, keys = _beside(params, (cache, last, keys))
    blocks, none = _beside(params, (make_blocks(prompts, block), np.zeros((b, 1), bool)))
    step = Block(_draw(last, keys=keys, step=0, **options)[1], none)
    for tokens, padding in {one.tokens.shape: one for one in (*blocks, step)}.values():
        extend.lower(params, tokens, padding, cache, last).compile()
    draw, extend = partial(_draw, keys=keys, **options), partial(extend, params)
    return _run(draw, extend, blocks, none, max_new_tokens, cache, last)


def _run(
    draw: Callable[..., tuple[Array, Array]],
    extend: Callable[..., tuple[Array, tuple[AnyCache, ...]]],
    blocks: list[Block],
    none: Array,
    max_new_tokens: int,
    cache: tuple[AnyCache, ...],
    last: Array,
) -> Iterator[Array]:
    for tokens, padding in blocks:
        last, cache = extend(tokens, padding, cache, last)
    for step in range(max_new_tokens):
        new, column = draw(last, step=step)
        if step + 1 < max_new_tokens:
            last, cache = extend(column, none, cache, last)
        yield new


@lru_cache(maxsize=16)
def _make_programs(graphdef: nnx.GraphDef) -> tuple[Any, Any]:
    """Return what begins the streams, and what reads their next tokens [b, w], both compiled.

    The second returns the logits after each row's last token, [b, s]; a row without a token in the
    block keeps those that it had.
    """

    def start(
        params: Any,
        seed: Array,
        rows: Array,
        room: int,
        cache_dtype: Dtype,
        cache_device: str,
    ) -> tuple[tuple[AnyCache, ...], Array, Array]:
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(
            len(rows), room, cache_dtype=cache_dtype, cache_device=cache_device
        )
        last = jnp.zeros((len(rows), model.config.vocab_size), state_dtype(model.dtype))
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows)
        return cache, last, keys

    def extend(
        params: Any, tokens: Array, padding: Array, cache: tuple[AnyCache, ...], last: Array
    ) -> tuple[Array, tuple[AnyCache, ...]]:
        model = nnx.merge(graphdef, params)
        logits, cache = model.extend(tokens, cache, padding=padding)
        count = jnp.sum(~padding, axis=1)[:, None]
        at = jnp.maximum(count - 1, 0)[:, :, None]
        after = jnp.take_along_axis(logits, at, axis=1)[:, 0]
        return jnp.where(count > 0, after, last), cache

    return (
        jax.jit(start, static_argnames=("room", "cache_dtype", "cache_device")),
        jax.jit(extend, donate_argnames=("cache", "last")),
    )


def _beside(params: Any, tree: Any) -> Any:
    """Put arrays where the parameters are, bound to that device if they are.

    Where parameters are bound to a device, so are all results; arrays that are not would need a
    program of their own.
    """
    leaf = jax.tree.leaves(params)[0]
    if not leaf.committed or len(leaf.devices()) > 1:
        return jax.device_put(tree)

    def put(x: Any) -> Array:
        kind = (x if isinstance(x, jax.Array) else leaf).sharding.memory_kind
        return jax.device_put(x, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


@partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def _draw(logits: Array, keys: Array, step: int, **options: Any) -> tuple[Array, Array]:
    """Return the tokens of a step [b], and the same as the next ones of a stream [b, 1]."""
    rng = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    tokens = sample(logits, rng, **options)
    return tokens, tokens[:, None]


def _truncate(logits: Array, top_k: int | None, top_p: float | None) -> tuple[Array, Array]:
    """Put -inf in the place of logits that are not kept.

    Returns:
        logits [b, s], from the largest on where some may go, and the id of each, int32 [b, s].
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape)
    if top_k is None and (top_p is None or top_p == 1):
        return logits, ids
    order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked = jnp.where(ids < top_k, ranked, -jnp.inf)
    if top_p is not None and top_p < 1:
        shares = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    return ranked, order
