"""Next tokens, one after another: prompts in chunks, then one step a token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mc_core.generation import (
    PROMPT_BLOCK,
    Block,
    bucket,
    check_generation,
    check_sampling,
    make_blocks,
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
) -> Array:
    """Choose a token from the logits of each row.

    The logits are divided by the temperature; of these `top_k` remain, and of those the fewest
    whose probabilities add up to `top_p`. Of equal logits the lower id goes first.

    Args:
        logits: [b, vocab_size].
        rng: generators [b], one a row; a row's draw depends on its own. None where the temperature
            is 0.
        temperature: 0 takes the largest logit.
        top_k: keep so many; None = all.
        top_p: keep this probability, in (0, 1]; None = all.

    Returns:
        ids [b], int64; -1 where the largest logit is not finite.

    Raises:
        ValueError: an option out of range, or no `rng` where one is needed.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.to(state_dtype(logits.dtype))
    if temperature == 0:
        tokens = _first_largest(logits)
    elif rng is None:
        raise ValueError(f"rng = None: must be given where temperature = {temperature}")
    else:
        ranked, order = _truncate(logits / temperature, top_k, top_p)
        noise = torch.stack([_gumbel(ranked[0], generator) for generator in rng])
        choice = _first_largest(ranked + noise)
        tokens = torch.gather(order, -1, choice[:, None])[:, 0]
    finite = torch.isfinite(torch.amax(logits, dim=-1))
    return torch.where(finite, tokens, -1)


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
        block: the most tokens of the prompts that are read at once.

    Returns:
        An iterator of the next id of each row, int64 [b]; -1 as `sample` gives it.

    Raises:
        ValueError: an argument out of range, or segments that cannot stream.
    """
    rows = range(len(prompts)) if rows is None else rows
    b, vocab_size = len(prompts), model.config.vocab_size
    check_sampling(temperature, top_k, top_p)
    check_generation(prompts, vocab_size, max_new_tokens, seed, rows, block)
    if not b:
        device = next(model.parameters()).device
        return iter([torch.zeros(0, dtype=torch.int64, device=device)] * max_new_tokens)
    room = bucket(max(map(len, prompts)) + max_new_tokens)
    cache = model.init_cache(b, room, cache_dtype=cache_dtype, cache_device=cache_device)
    rng = [_generator(seed, row) for row in rows]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _run(model, make_blocks(prompts, block), max_new_tokens, cache, rng, options)


def _run(
    model: LanguageModel,
    blocks: list[Block],
    max_new_tokens: int,
    cache: tuple[AnyCache, ...],
    rng: list[torch.Generator],
    options: dict[str, Any],
) -> Iterator[Array]:
    device, last = cache[0].position.device, None
    for block in blocks:
        tokens, padding = (torch.from_numpy(x.copy()).to(device) for x in block)
        last, cache = _extend(model, tokens, padding, cache, last)
    for step in range(max_new_tokens):
        assert last is not None
        new = sample(last, rng, **options)
        if step + 1 < max_new_tokens:
            last, cache = _extend(model, new[:, None], None, cache, last)
        yield new


# A decorator, not a block of the iterator: that would stay in force in the caller between tokens.
@torch.no_grad()
def _extend(
    model: LanguageModel,
    tokens: Array,
    padding: Array | None,
    cache: tuple[AnyCache, ...],
    last: Array | None,
) -> tuple[Array, tuple[AnyCache, ...]]:
    """Return the logits after each row's last token of [b, w], [b, s].

    A row without a token in the block keeps the logits that it had. After -1 they are NaN.
    """
    # A check of every new token would wait for the device.
    logits, cache = model.extend(tokens, cache, padding=padding, check=padding is not None)
    if padding is None:
        return logits[:, -1], cache
    count = torch.sum(~padding, dim=1)[:, None]
    at = torch.clamp(count - 1, min=0)[:, :, None].expand(-1, -1, logits.shape[-1])
    after = torch.gather(logits, 1, at)[:, 0]
    return after if last is None else torch.where(count > 0, after, last), cache


def _truncate(logits: Array, top_k: int | None, top_p: float | None) -> tuple[Array, Array]:
    """Put -inf in the place of logits that are not kept.

    Returns:
        logits [b, s], from the largest on where some may go, and the id of each, int64 [b, s].
    """
    ids = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape)
    if top_k is None and (top_p is None or top_p == 1):
        return logits, ids
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)
    ranked = torch.gather(logits, -1, order)
    if top_k is not None:
        ranked = torch.where(ids < top_k, ranked, -torch.inf)
    if top_p is not None and top_p < 1:
        shares = torch.softmax(ranked, dim=-1)
        before = torch.cumsum(shares, dim=-1) - shares
        ranked = torch.where(before < top_p, ranked, -torch.inf)
    return ranked, order


def _first_largest(x: Array) -> Array:
    """Return the index of the largest value of each row [b, s], the first of equal ones."""
    # argmax promises no order among equal values; of equal booleans neither, but a sum counts them.
    largest = x == torch.amax(x, dim=-1, keepdim=True)
    return torch.sum(torch.cumsum(largest, dim=-1) == 0, dim=-1).clamp(max=x.shape[-1] - 1)


def _gumbel(like: Array, generator: torch.Generator) -> Array:
    """Draw standard Gumbel noise in the shape of `like`."""
    drawn = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    drawn = drawn.exponential_(generator=generator).clamp(min=torch.finfo(like.dtype).tiny)
    return -torch.log(drawn).to(like.device)


def _generator(seed: int, row: int) -> torch.Generator:
    """Return the random stream of a row; on the CPU, so that every device draws the same."""
    (state,) = np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
