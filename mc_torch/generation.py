"""Autoregressive generation: prompts in blocks, then one step per token."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

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
from mc_torch.cache import AnyCache
from mc_torch.model import LanguageModel
from mc_torch.numerics import Array, Dtype, state_dtype


def sample(
    logits: Array,
    rng: Sequence[torch.Generator] | None = None,
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
        rng: generators [b], one per row; None with temperature 0.
        temperature: 0 = greedy.
        top_k: number of logits to keep; None = all.
        top_p: total probability of the ids to keep, in (0, 1]; None = all.
        min_p: probability of the ids to keep as a share of the largest one, in [0, 1]; None = all.
        repetition_penalty: penalty > 0 of the ids in `seen`; 1 = none.
        seen: ids that have occurred in each row, bool [b, vocab_size]; None with penalty 1.

    Returns:
        ids [b], int64; -1 if the largest logit is not finite.

    Raises:
        ValueError: an option is out of range, or `rng` or `seen` is missing.
    """
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    logits = logits.to(state_dtype(logits.dtype))
    finite = torch.isfinite(torch.amax(logits, dim=-1))
    logits = _penalize(logits, repetition_penalty, seen)
    if temperature == 0:
        tokens = _first_largest(logits)
    elif rng is None:
        raise ValueError(f"rng = None: must be given for temperature = {temperature}")
    else:
        ranked, order = _truncate(logits / temperature, top_k, top_p, min_p)
        noise = torch.stack([_gumbel(ranked[0], generator) for generator in rng])
        choice = _first_largest(ranked + noise)
        tokens = torch.gather(order, -1, choice[:, None])[:, 0]
    return torch.where(finite, tokens, -1)


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
    cache = model.init_cache(
        len(prompts), max_tokens, cache_dtype=cache_dtype, cache_device=cache_device
    )
    return _read(model, make_blocks(prompts, block), cache)


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
    """Continue prompts. The result of a row does not depend on the other rows.

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
        block: maximum number of prompt tokens per call.

    Returns:
        An iterator over the next id of each row, int64 [b]; -1 as in `sample`.

    Raises:
        ValueError: an argument is out of range, or the segments cannot stream.
    """
    rows = range(len(prompts)) if rows is None else rows
    b, vocab_size = len(prompts), model.config.vocab_size
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    check_generation(prompts, vocab_size, max_new_tokens, seed, rows, block)
    if not b:
        device = next(model.parameters()).device
        return iter([torch.zeros(0, dtype=torch.int64, device=device)] * max_new_tokens)
    capacity = bucket(max(map(len, prompts)) + max_new_tokens)
    cache = model.init_cache(b, capacity, cache_dtype=cache_dtype, cache_device=cache_device)
    seen = None
    if repetition_penalty != 1:
        device = cache[0].position.device
        seen = torch.from_numpy(mark_prompt_ids(prompts, vocab_size)).to(device)
    options = {
        "rng": [_generator(seed, row) for row in rows],
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seen": seen,
    }
    return _run(model, make_blocks(prompts, block), max_new_tokens, cache, options)


def _run(
    model: LanguageModel,
    blocks: list[PromptBlock],
    max_new_tokens: int,
    cache: tuple[AnyCache, ...],
    options: dict[str, Any],
) -> Iterator[Array]:
    seen = options["seen"]
    last, cache = _read(model, blocks, cache)
    for step in range(max_new_tokens):
        new = sample(last, **options)
        if seen is not None:
            seen |= torch.arange(seen.shape[1], device=seen.device) == new[:, None]
        if step + 1 < max_new_tokens:
            last, cache = _extend(model, new[:, None], None, cache, last)
        yield new


def _read(
    model: LanguageModel, blocks: list[PromptBlock], cache: tuple[AnyCache, ...]
) -> tuple[Array, tuple[AnyCache, ...]]:
    """Return the logits after the last token of each row [b, s], and the cache."""
    device, last = cache[0].position.device, None
    for block in blocks:
        tokens, padding = (torch.from_numpy(x.copy()).to(device) for x in block)
        last, cache = _extend(model, tokens, padding, cache, last)
    assert last is not None
    return last, cache


# Not a `with` block in the iterator, which would stay active in the caller between tokens.
@torch.no_grad()
def _extend(
    model: LanguageModel,
    tokens: Array,
    padding: Array | None,
    cache: tuple[AnyCache, ...],
    last: Array | None,
) -> tuple[Array, tuple[AnyCache, ...]]:
    """Return the logits after each row's last token of [b, w], [b, s].

    A row without tokens in the block retains its previous logits. Logits after id -1 are NaN.
    """
    # Checking every new token would synchronize with the device.
    logits, cache = model.extend(tokens, cache, padding=padding, check=padding is not None)
    if padding is None:
        return logits[:, -1], cache
    count = torch.sum(~padding, dim=1)[:, None]
    index = torch.clamp(count - 1, min=0)[:, :, None].expand(-1, -1, logits.shape[-1])
    after = torch.gather(logits, 1, index)[:, 0]
    return after if last is None else torch.where(count > 0, after, last), cache


def _penalize(logits: Array, penalty: float, seen: Array | None) -> Array:
    """Reduce the logits [b, s] of the ids in `seen`, bool [b, s]; penalty 1 = none."""
    if penalty == 1:
        return logits
    if seen is None:
        raise ValueError(f"seen = None: must be given for repetition_penalty = {penalty}")
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _truncate(
    logits: Array, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Array, Array]:
    """Set logits outside of the top-k, top-p or min-p set to -inf.

    Returns:
        logits [b, s], in descending order if truncated, and the id of each, int64 [b, s].
    """
    ids = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    ranked, order = logits, ids
    if top_k is not None or (top_p is not None and top_p < 1):
        order = torch.argsort(logits, dim=-1, descending=True, stable=True)
        ranked = torch.gather(logits, -1, order)
    if top_k is not None:
        ranked = torch.where(ids < top_k, ranked, -torch.inf)
    if top_p is not None and top_p < 1:
        probabilities = torch.softmax(ranked, dim=-1)
        before = torch.cumsum(probabilities, dim=-1) - probabilities
        ranked = torch.where(before < top_p, ranked, -torch.inf)
    if min_p:
        least = torch.amax(ranked, dim=-1, keepdim=True) + math.log(min_p)
        ranked = torch.where(ranked >= least, ranked, -torch.inf)
    return ranked, order


def _first_largest(x: Array) -> Array:
    """Return the index of the first maximum of each row [b, s]."""
    # torch.argmax does not guarantee which of several maxima it returns.
    largest = x == torch.amax(x, dim=-1, keepdim=True)
    return torch.sum(torch.cumsum(largest, dim=-1) == 0, dim=-1).clamp(max=x.shape[-1] - 1)


def _gumbel(like: Array, generator: torch.Generator) -> Array:
    """Draw standard Gumbel noise in the shape of `like`."""
    noise = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    noise = noise.exponential_(generator=generator).clamp(min=torch.finfo(like.dtype).tiny)
    return -torch.log(noise).to(like.device)


def _generator(seed: int, row: int) -> torch.Generator:
    """Return the random stream of a row, on the CPU, so that it is the same on all devices."""
    (state,) = np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
