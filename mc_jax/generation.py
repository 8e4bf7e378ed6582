"""Autoregressive generation: prompts in blocks, then one compiled step per token."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mc_core.checks import check_integer
from mc_core.generation import (
    PROMPT_BLOCK,
    PromptBlock,
    bucket,
    check_generation,
    check_prompts,
    check_sampling,
    make_blocks,
    mark_prompt_ids,
)
from mc_jax.cache import AnyCache
from mc_jax.model import LanguageModel
from mc_jax.numerics import Array, Dtype, state_dtype
from mc_jax.sharding import axes_sharding, mesh_of, split_rows, use_mesh_of


def sample(
    logits: Array,
    rng: Array | None = None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Array | None = None,
) -> Array:
    """Sample a token from the logits of each row.

    The logit of every id in `seen` is divided by `repetition_penalty` if it is positive, and
    multiplied by it otherwise (arXiv:1909.05858, section 4.1). Logits are then divided by the
    temperature, truncated to the `top_k` largest, to the smallest set with a total probability of
    at least `top_p`, and to the ids with at least `min_p` times the largest probability. Ties go to
    the lower id.

    Args:
        logits: [b, vocab_size].
        rng: keys [b], one per row; None with temperature 0.
        temperature: 0 = greedy.
        top_k: number of logits to keep; None = all.
        top_p: total probability of the ids to keep, in (0, 1]; None = all.
        min_p: probability of the ids to keep as a share of the largest one, in [0, 1]; None = all.
        repetition_penalty: penalty > 0 of the ids in `seen`; 1 = none.
        seen: ids that have occurred in each row, bool [b, vocab_size]; None with penalty 1.

    Returns:
        ids [b], int32; -1 if the largest logit is not finite.

    Raises:
        ValueError: an option is out of range, or `rng` or `seen` is missing.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    logits = logits.astype(state_dtype(logits.dtype))
    finite = jnp.isfinite(jnp.max(logits, axis=-1))
    logits = _penalize(logits, repetition_penalty, seen)
    if temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    elif rng is None:
        raise ValueError(f"rng = None: must be given for temperature = {temperature}")
    else:
        ranked, order = _truncate(logits / temperature, top_k, top_p, min_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, ranked.shape[1:], ranked.dtype))(rng)
        choice = jnp.argmax(ranked + noise, axis=-1)
        tokens = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
    return jnp.where(finite, tokens, -1).astype(jnp.int32)


def prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_tokens: int,
    *,
    cache_dtype: Dtype = None,
    cache_device: str = "device",
    block: int = PROMPT_BLOCK,
) -> tuple[Array, tuple[AnyCache, ...]]:
    """Process prompts of different lengths, without padding by the caller.

    Args:
        model: the language model, with `constant` or `fenwick` segments.
        prompts: ids of each row, at least one per row.
        max_tokens: capacity of the cache in tokens.
        cache_dtype: dtype of the cached memories; None = that of the online memory.
        cache_device: storage of cached memories, `device` or `host`.
        block: maximum number of prompt tokens per call.

    Returns:
        logits after the last token of each prompt, [b, vocab_size], and the cache, for `extend`.

    Raises:
        ValueError: an argument is out of range, or the segments cannot stream.
    """
    check_prompts(prompts, model.config.vocab_size)
    check_integer("block", block, 1)
    check_integer("number of prompts", len(prompts), 1)
    check_integer("max_tokens", max_tokens, max(map(len, prompts)))
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    start, extend = _make_programs(graphdef)
    stream = np.uint32(0), np.arange(len(prompts), dtype=np.uint32)
    cache, last, _ = start(
        params, *stream, capacity=max_tokens, cache_dtype=cache_dtype, cache_device=cache_device
    )
    cache, last = _place_like(params, (cache, last))
    for tokens, padding in _place_like(params, make_blocks(prompts, block)):
        last, cache = extend(params, tokens, padding, cache, last)
    return last, cache


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    cache_dtype: Dtype = None,
    cache_device: str = "device",
    block: int = PROMPT_BLOCK,
) -> Iterator[Array]:
    """Generate continuations of prompts. The result of a row does not depend on the other rows.

    All programs are compiled before this function returns: one per number of rows, block width and
    capacity (rounded up to a power of two). The next step is dispatched before a token is yielded.

    Args:
        model: the language model, with `constant` or `fenwick` segments.
        prompts: ids of each row, at least one per row.
        max_new_tokens: number of tokens to generate per row; the caller may stop earlier.
        temperature: as in `sample`.
        top_k: as in `sample`.
        top_p: as in `sample`.
        min_p: as in `sample`.
        repetition_penalty: penalty of the ids of the prompt and of all generated ids, as in
            `sample`.
        seed: seed of all random streams.
        rows: index of each row's random stream; None = 0, 1, ...
        cache_dtype: dtype of the cached memories; None = that of the online memory.
        cache_device: storage of cached memories, `device` or `host`.
        block: maximum number of prompt tokens per call; with 1, prompts use the program that is
            compiled for single generated tokens.

    Returns:
        An iterator over the next id of each row, int32 [b]; -1 as in `sample`.

    Raises:
        ValueError: an argument is out of range, or the segments cannot stream.
    """
    rows = range(len(prompts)) if rows is None else rows
    b, vocab_size = len(prompts), model.config.vocab_size
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_generation(prompts, vocab_size, max_new_tokens, seed, rows, block)
    if not b:
        return iter([jnp.zeros(0, jnp.int32)] * max_new_tokens)
    capacity = bucket(max(map(len, prompts)) + max_new_tokens)
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }

    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    start, extend = _make_programs(graphdef)
    stream = np.uint32(seed), np.asarray(rows, np.uint32)
    cache, last, keys = start(
        params, *stream, capacity=capacity, cache_dtype=cache_dtype, cache_device=cache_device
    )
    cache, last, keys = _place_like(params, (cache, last, keys))
    blocks, no_padding = _place_like(params, (make_blocks(prompts, block), np.zeros((b, 1), bool)))
    seen = None
    if repetition_penalty != 1:
        seen = _place_like(params, mark_prompt_ids(prompts, vocab_size))
    with use_mesh_of(params):
        column = _draw(last, keys=keys, step=0, seen=seen, **options)[1]
        step = PromptBlock(column, no_padding)
        if (mesh := mesh_of(params)) is not None and mesh.size > 1:
            # XLA chooses the sharding of the cache, once for all programs.
            chosen = extend.lower(params, *step, cache, last).compile().output_shardings
            last, cache = jax.device_put((last, cache), chosen)
            leaves, tree = jax.tree.flatten(chosen)
            _, extend = _make_programs(graphdef, (tree, tuple(leaves)))
        for tokens, padding in {block.tokens.shape: block for block in (*blocks, step)}.values():
            extend.lower(params, tokens, padding, cache, last).compile()
    draw = partial(_on_mesh_of, params, partial(_draw, keys=keys, **options))
    extend = partial(_on_mesh_of, params, partial(extend, params))
    return _run(draw, extend, blocks, no_padding, max_new_tokens, (cache, last, seen))


def _on_mesh_of(params: Any, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with use_mesh_of(params):
        return function(*args, **options)


def _run(
    draw: Callable[..., tuple[Array, Array, Array | None]],
    extend: Callable[..., tuple[Array, tuple[AnyCache, ...]]],
    blocks: list[PromptBlock],
    no_padding: Array,
    max_new_tokens: int,
    state: tuple[tuple[AnyCache, ...], Array, Array | None],
) -> Iterator[Array]:
    cache, last, seen = state
    for tokens, padding in blocks:
        last, cache = extend(tokens, padding, cache, last)
    for step in range(max_new_tokens):
        new, column, seen = draw(last, step=step, seen=seen)
        if step + 1 < max_new_tokens:
            last, cache = extend(column, no_padding, cache, last)
        yield new


@lru_cache(maxsize=16)
def _make_programs(
    graphdef: nnx.GraphDef, shardings: tuple[Any, tuple[Any, ...]] | None = None
) -> tuple[Any, Any]:
    """Return compiled functions that initialize the streams and process their next tokens [b, w].

    The second function returns the logits after the last token of each row, [b, s]. A row without
    tokens in the block retains its previous logits. `shardings` of its results are a tree and its
    leaves; None = chosen by XLA.
    """

    def start(
        params: Any,
        seed: Array,
        rows: Array,
        capacity: int,
        cache_dtype: Dtype,
        cache_device: str,
    ) -> tuple[tuple[AnyCache, ...], Array, Array]:
        model = nnx.merge(graphdef, params)
        cache = model.init_cache(
            len(rows), capacity, cache_dtype=cache_dtype, cache_device=cache_device
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
        index = jnp.maximum(count - 1, 0)[:, :, None]
        after = jnp.take_along_axis(logits, index, axis=1)[:, 0]
        return jnp.where(count > 0, after, last), cache

    results = None if shardings is None else jax.tree.unflatten(*shardings)
    return (
        jax.jit(start, static_argnames=("capacity", "cache_dtype", "cache_device")),
        jax.jit(extend, donate_argnames=("cache", "last"), out_shardings=results),
    )


def _place_like(params: Any, tree: Any) -> Any:
    """Place arrays on the device of the parameters, committed if the parameters are committed.

    On a mesh, rows are sharded. Otherwise JAX would compile separate programs for uncommitted
    inputs and committed results.
    """
    leaf = jax.tree.leaves(params)[0]
    if len(leaf.devices()) > 1:
        return split_rows(tree, params)
    if not leaf.committed:
        return jax.device_put(tree)
    mesh = mesh_of(params)
    sharding: Any = leaf.sharding if mesh is None else axes_sharding(mesh)

    def put(x: Any) -> Array:
        kind = (x if isinstance(x, jax.Array) else leaf).sharding.memory_kind
        return jax.device_put(x, sharding.with_memory_kind(kind))

    return jax.tree.map(put, tree)


@partial(jax.jit, static_argnames=("temperature", "top_k", "top_p", "min_p", "repetition_penalty"))
def _draw(
    logits: Array, keys: Array, step: int, seen: Array | None, **options: Any
) -> tuple[Array, Array, Array | None]:
    """Return the tokens of a step [b], the next input [b, 1], and the ids that have occurred."""
    rng = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
    tokens = sample(logits, rng, seen=seen, **options)
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1]) == tokens[:, None])
    return tokens, tokens[:, None], seen


def _penalize(logits: Array, penalty: float, seen: Array | None) -> Array:
    """Reduce the logits [b, s] of the ids in `seen`, bool [b, s]; penalty 1 = none."""
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"seen = None: must be given for repetition_penalty = {penalty}")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _truncate(
    logits: Array, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Array, Array]:
    """Set logits outside of the top-k, top-p or min-p set to -inf.

    Returns:
        logits [b, s], in descending order if truncated, and the id of each, int32 [b, s].
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape)
    ranked, order = logits, ids
    if top_k is not None or (top_p is not None and top_p < 1):
        order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked = jnp.where(ids < top_k, ranked, -jnp.inf)
    if top_p is not None and top_p < 1:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    if min_p:
        least = jnp.max(ranked, axis=-1, keepdims=True) + math.log(min_p)
        ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    return ranked, order
